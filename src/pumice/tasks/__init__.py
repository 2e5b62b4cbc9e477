"""What people do with a model beyond asking it; each task holds a model and reaches no deeper."""
