"""Work on the weights of whole checkpoints: compare, average, cast, merge an adapter. Needs torch.

Everything but the merge streams: tensors are read, computed and written in blocks, so a model never has to
fit into memory.
"""
