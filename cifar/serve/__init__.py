"""A published model over HTTP. Nothing here imports Ray Train, Tune or Data: the serving image stays small."""
