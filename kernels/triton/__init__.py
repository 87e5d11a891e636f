"""The Triton bodies of the ops, imported when one of them first runs on a GPU, or in Triton's interpreter."""
