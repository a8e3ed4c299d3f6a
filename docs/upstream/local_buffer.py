"""Inductor's C++ code takes the last row of each tile for all of them: pytorch issue 185702, mended in torch 2.14.

The sum is read by a reduction and by what follows it, and so written down; a transposed result makes the shared loop
over tokens go by tiles of 16 (with AVX-512), and the sum's local buffer has room for one row. Prints in torch 2.13.0:
relative error 1.4, right tokens [15, 31].
"""

import torch

torch.set_num_threads(1)
torch.manual_seed(0)


def normalised_sum(z, a, b, c, d):
    hidden = z.t() + a + b + c + d
    return hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True))


args = [torch.randn(64, 32), *(torch.randn(32, 64) for _ in range(4))]
with torch.no_grad():
    found, right = torch.compile(normalised_sum)(*args), normalised_sum(*args)
print("relative error", ((found - right).norm() / right.norm()).item())
print("right tokens", [index for index in range(32) if torch.allclose(found[index], right[index], atol=1e-4)])
