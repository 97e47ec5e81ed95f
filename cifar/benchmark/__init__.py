"""What each stage of a run costs, how long an accuracy takes, and what more workers bring.

Nothing is imported here: the flags must be readable without torch.
"""
