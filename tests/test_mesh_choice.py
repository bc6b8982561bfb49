"""The meshes that are chosen divide what they share."""

import dataclasses

import pytest
from jax.sharding import AbstractMesh

from sora_jax import mesh as mesh_lib
from sora_jax.errors import InputError
from sora_jax.interop.presets import PRESETS
from sora_jax.mesh_choice import generating_mesh, generating_meshes, training_mesh, training_meshes
from sora_jax.model_config import abstract_params
from sora_jax.models import read_config
from sora_jax.vision import VisionConfig


def test_a_mesh_is_chosen_that_divides():
    a14b, small = PRESETS["wan2.2-t2v-a14b"], PRESETS["wan2.1-t2v-1.3b"]
    assert generating_mesh(a14b, (720, 1280), 8)[0] == "data=1,context=8,tensor=1"
    # 1560 tokens a frame: 16 does not divide them, 8 does.
    mesh, reason = generating_mesh(small, (480, 832), 16)
    assert mesh == "data=2,context=8,tensor=1" and "rings of 2" in reason and "a branch of guidance on each" in reason
    # Without rings, 12 heads have the patches split among 4: the branches of guidance take the rest.
    assert generating_mesh(small, (480, 832), 8)[0] == "data=1,context=8,tensor=1"
    mesh, reason = generating_mesh(small, (480, 832), 8, rings=False)
    assert mesh == "data=2,context=4,tensor=1" and "all-to-all among 4;" in reason
    assert generating_mesh(small, (480, 832), 8, is_guided=False, rings=False)[0] == "data=1,context=8,tensor=1"
    assert generating_mesh(small, (480, 832), 1) == ("data=1,context=1,tensor=1", "one device")
    mesh, reason = generating_mesh(small, (480, 832), 128)
    assert mesh == "data=4,context=8,tensor=4" and reason.endswith("data=4 makes 2 videos in the time of one")
    assert "data=2,context=4,tensor=1" in generating_meshes(a14b, (720, 1280), 8)
    eight = "data=8,context=1,tensor=1"
    assert [eight in generating_meshes(a14b, (720, 1280), 8, batch) for batch in (1, 3, 4)] == [False, False, True]
    # 192 chips: no mesh with one copy of the parameters divides a width of 5120.
    meshes = training_meshes(PRESETS["wan2.1-t2v-14b"], (720, 1280), 192, 192)
    assert "data=3,fsdp=64,context=1,tensor=1" in meshes and all(mesh.startswith("data=3,") for mesh in meshes)
    reads_pictures = dataclasses.replace(
        PRESETS["wan2.1-i2v-14b"],
        dit=dataclasses.replace(PRESETS["wan2.1-i2v-14b"].dit, image_width=20),
        vision=VisionConfig(width=20, heads=2, feed_forward=40, layers=1),
    )
    assert generating_mesh(reads_pictures, (720, 1280), 8)[0] == "data=2,context=4,tensor=1"
    sizes = ((a14b, (720, 1280)), (small, (480, 832)), (PRESETS["wan2.2-ti2v-5b"], (704, 1280)))
    for config, size in (*sizes, (reads_pictures, (720, 1280))):
        for number in (3, 6, 8, 12, 20, 40, 96):
            words, _ = generating_mesh(config, size, number)
            sizes = mesh_lib.parse_sizes(words)
            mesh_lib.check_mesh(sizes, number)
            mesh = AbstractMesh(tuple(sizes.values()), mesh_lib.AXES)
            abstract_params(config, mesh)  # which says so where the mesh cannot divide a parameter


def test_a_mesh_for_training_divides_the_batch_and_what_is_trained():
    small, bundled = PRESETS["wan2.1-t2v-1.3b"], read_config(None)
    assert training_mesh(16, 16, small.dit)[0] == "data=1,fsdp=16,context=1,tensor=1"
    mesh, reason = training_mesh(4, 16, small.dit)
    assert mesh == "data=1,fsdp=4,context=4,tensor=1" and "context=4 the patches or rows of each video" in reason
    # 16 divides the width, but not the 1560 tokens of a frame: tensor takes what context leaves.
    assert training_mesh(1, 16, small.dit)[0] == "data=1,fsdp=1,context=16,tensor=1"
    assert training_mesh(1, 16, small.dit, tokens=small.tokens(1, (480, 832)))[0].endswith("context=8,tensor=2")
    # 12 heads and a width of 1536 = 3 * 512: nothing takes the fives.
    assert training_mesh(40, 40, small.dit)[0] == "data=5,fsdp=8,context=1,tensor=1"
    with pytest.raises(InputError, match="divides a batch of 8 with widths of 1536; a batch of 5 would do"):
        training_mesh(8, 40, small.dit)
    assert training_mesh(6, 4)[0] == "data=1,fsdp=2,context=2,tensor=1"  # of a codec
    for number in (1, 3, 4, 6, 8, 12, 16):
        for batch in (number, 4 * number):
            words, _ = training_mesh(batch, number, bundled.text, bundled.dit)
            sizes = mesh_lib.parse_sizes(words)
            mesh_lib.check_mesh(sizes, number)
            assert batch % (sizes["data"] * sizes["fsdp"]) == 0
            abstract_params(bundled, AbstractMesh(tuple(sizes.values()), mesh_lib.AXES))
