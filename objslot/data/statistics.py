"""ImageNet statistics of RGB in [0, 1], which the published encoders were trained with."""

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
