"""Inductor's C++ code scatters transposed tiles to wrong places: pytorch issue 191837, mended in torch 2.14.

Its tiled kernel adds the position in the tile to the index of an atomic addition twice, with two threads or more. The
rows that are written lie in the first third of a buffer that is large enough for the wrong places, too.
"""

import torch

torch.set_num_threads(2)
torch.manual_seed(0)


def scattered(first, second, third, rows, index):
    values = (first.t() + second.t() + third.t()) * rows
    return torch.zeros(96, 64).index_put((index,), values, accumulate=True)


args = [*torch.randn(3, 64, 128).unbind(), torch.randn(128, 64), torch.randint(0, 32, (128,))]
with torch.no_grad():
    found, right = torch.compile(scattered)(*args), scattered(*args)
print("relative error", ((found - right).norm() / right.norm()).item())
