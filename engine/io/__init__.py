"""Reading models, datasets and tensors. `facts` and `datasets` import no torch."""
