"""Prints which attack broke each of 40 images in the norm that is named: run by test_autoattack.py on 1 and 8 devices."""

import json
import sys

import jax
from test_autoattack import KEY, RADII, quietly, small_attacks, world

from jax_trustdiff import parallel

classifier, x, y = world()
norm, radius = sys.argv[1], RADII[sys.argv[1]]
attack = quietly(
  norm=norm, radius=radius, version=small_attacks(norm, radius), chunk_size=16, mesh=parallel.make_mesh()
)
print(
  json.dumps({"devices": jax.device_count(), "broken_by": attack(classifier, x, y, KEY).broken_by.tolist()})
)
