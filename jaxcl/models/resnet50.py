"""ResNet-50 (He et al. 2016), of bottlenecks; see `_resnet`."""

from jaxcl.models._resnet import ResNet


class ResNet50(ResNet):
    blocks, bottleneck = (3, 4, 6, 3), True


resnet50 = ResNet50
