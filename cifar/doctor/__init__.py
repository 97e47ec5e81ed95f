"""What would go wrong on this machine or cluster, before it does; and drills of what must not go wrong."""
