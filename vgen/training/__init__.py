"""Lightning modules, callbacks and the run that train.py starts."""
