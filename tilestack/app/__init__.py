"""The application layer: the parts that train.py is made of. train.py owns the loop."""
