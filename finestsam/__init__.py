"""Fine-tune Segment Anything on labelled images, so that its automatic mask generator finds their objects."""

__version__ = "0.1.0"
