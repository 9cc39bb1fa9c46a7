"""The attacks by name, for sections of a config. Each is a function (logits_fn, x, y, key) -> x_adv."""

from jax_trustdiff.attacks.apgd import APGD
from jax_trustdiff.attacks.fab import FAB
from jax_trustdiff.attacks.pgd import PGD, fgsm
from jax_trustdiff.attacks.square import Square

ATTACKS = {"pgd": PGD, "fgsm": fgsm, "apgd": APGD, "fab": FAB, "square": Square}
