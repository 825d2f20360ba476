"""Membership inference by a trained attack: `LanguageMIA`, `ImageMIA`.

records      the two sets: read, overlap removed
classifier   features -> an attack model chosen by nested cross-validation -> measured once
language, image
             the features of texts, of images and rows
plots        pictures, where asked for
"""

from dptorch.audit.membership.classifier import attack_features
from dptorch.audit.membership.image import ImageMIA
from dptorch.audit.membership.language import LanguageMIA

__all__ = ["ImageMIA", "LanguageMIA", "attack_features"]
