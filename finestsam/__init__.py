"""Fine-tune Segment Anything on labelled pictures, so that its automatic mask generator finds their objects."""

__version__ = "0.1.0"
