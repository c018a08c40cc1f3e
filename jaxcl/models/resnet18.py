"""ResNet-18 (He et al. 2016); see `_resnet`."""

from jaxcl.models._resnet import ResNet


class ResNet18(ResNet):
    blocks, bottleneck = (2, 2, 2, 2), False


resnet18 = ResNet18
