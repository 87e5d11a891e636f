"""A trained PyTorch network and a budget in; a physically smaller, verified, measured network out."""
