"""One thread per process: OpenMP's barriers make small networks a hundred times slower on a busy machine."""

import torch

torch.set_num_threads(1)
