"""Prints which attack broke each of 40 images: run by test_autoattack.py on 1 and 8 devices."""

import json

import jax
from test_autoattack import KEY, RADII, quietly, small_attacks, world

from jax_trustdiff import parallel

classifier, x, y = world()
found = {"devices": jax.device_count()}
for norm, radius in RADII.items():
  attack = quietly(
    norm=norm, radius=radius, version=small_attacks(norm, radius), chunk_size=16, mesh=parallel.make_mesh()
  )
  found[norm] = attack(classifier, x, y, KEY).broken_by.tolist()
print(json.dumps(found))
