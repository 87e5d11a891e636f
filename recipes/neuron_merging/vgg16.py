"""VGG-16 for CIFAR-10 with the activations of the authors' response."""

from __future__ import annotations

from functools import partial

from torch import nn

from sparsekit.models.vgg import vgg16

elu = partial(vgg16, activation=nn.ELU)
hardswish = partial(vgg16, activation=nn.Hardswish)
leaky_relu = partial(vgg16, activation=nn.LeakyReLU)
selu = partial(vgg16, activation=nn.SELU)
softsign = partial(vgg16, activation=nn.Softsign)
tanh = partial(vgg16, activation=nn.Tanh)
