"""Networks that several tests share: ResNet-20 as trained, a CNN with most operations, a transformer block; no data loading."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from conftest import DATA
from torch import Tensor, nn

RESNET20 = DATA / "resnet_cifar" / "resnet20-12fca82f.th"


class Shortcut(nn.Module):
    """Option A of He et al. 2015 (arXiv 1512.03385, 4.2): every second pixel, missing channels are zero; no parameters."""

    def __init__(self, extra: int) -> None:
        super().__init__()
        self.extra = extra

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.extra // 2, self.extra // 2), "constant", 0)


class BasicBlock(nn.Module):
    def __init__(self, planes_in: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(planes_in, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.shortcut = nn.Sequential() if stride == 1 else Shortcut(planes - planes_in)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return F.relu(out)


class ResNet20(nn.Module):
    """Three stages of three blocks for 32x32 images; ends in an average over what is left of the image."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(*[BasicBlock(16, 16, 1) for _ in range(3)])
        self.layer2 = nn.Sequential(BasicBlock(16, 32, 2), BasicBlock(32, 32, 1), BasicBlock(32, 32, 1))
        self.layer3 = nn.Sequential(BasicBlock(32, 64, 2), BasicBlock(64, 64, 1), BasicBlock(64, 64, 1))
        self.linear = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.layer3(self.layer2(self.layer1(out)))
        out = F.avg_pool2d(out, out.size()[3])
        return self.linear(out.view(out.size(0), -1))


def resnet20() -> nn.Module:
    """ResNet-20 with its published CIFAR-10 weights (keys lose their ``module.``), in eval mode."""
    checkpoint = torch.load(RESNET20, map_location="cpu", weights_only=True)
    state = checkpoint.get("state_dict", checkpoint)
    model = ResNet20()
    model.load_state_dict({name.removeprefix("module."): tensor for name, tensor in state.items()})
    return model.eval()


def settle(model: nn.Module) -> nn.Module:
    """Give batch norms statistics, and norms gains and shifts, that a wrong fold could not hide behind."""
    draw = torch.Generator().manual_seed(1)
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is not None and m.running_var is not None:
            m.running_mean.copy_(torch.randn(m.running_mean.shape, generator=draw) * 0.3)
            m.running_var.copy_(torch.rand(m.running_var.shape, generator=draw) + 0.5)
        if isinstance(m, (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm)) and m.weight is not None:
            m.weight.data.copy_(torch.rand(m.weight.shape, generator=draw) + 0.5)
            m.bias.data.copy_(torch.randn(m.bias.shape, generator=draw) * 0.3)
    return model.eval()


class SmallCNN(nn.Module):
    """(N, 3, 16, 16) -> (N, 10) with a stem, a depthwise-separable residual, a pooled branch and a concat."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.depth = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.depth_bn = nn.BatchNorm2d(8)
        self.point = nn.Conv2d(8, 8, 1)
        self.act = nn.Hardswish()
        self.up = nn.ConvTranspose2d(8, 8, 2, 2)
        self.up_bn = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.2)
        self.fc1 = nn.Linear(16, 12)
        self.fc1_bn = nn.BatchNorm1d(12)
        self.fc2 = nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.act(self.point(F.relu6(self.depth_bn(self.depth(x)))))
        a = F.max_pool2d(x, 2)
        b = F.relu(self.up_bn(self.up(F.avg_pool2d(x, 4))))
        x = torch.cat([a, b], 1)
        x = F.adaptive_avg_pool2d(x, 1).flatten(1)
        return self.fc2(F.relu(self.fc1_bn(self.fc1(self.drop(x)))))


class TransformerBlock(nn.Module):
    """(N, tokens, dim) -> (N, classes): a class token, pre-norm attention, an MLP; ``norm`` and ``act`` may be given apart."""

    def __init__(self, dim: int = 16, heads: int = 2, tokens: int = 7, classes: int = 5) -> None:
        super().__init__()
        self.heads = heads
        self.token = nn.Parameter(torch.randn(1, 1, dim))
        self.position = nn.Parameter(torch.randn(1, tokens + 1, dim) * 0.1)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.up, self.down = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)
        self.act = nn.GELU()
        self.head = nn.Linear(dim, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.position
        n, t, d = x.shape
        q, k, v = self.qkv(self.norm1(x)).reshape(n, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, d))
        x = x + self.down(self.act(self.up(self.norm2(x))))
        return self.head(x[:, 0])
