import pytest


@pytest.fixture(scope="session")
def liar():
    """The embedded organism."""
    import veridical as vd

    return vd.load("tiny-liar")


@pytest.fixture(autouse=True)
def _the_organism_is_left_as_it_was(request):
    yield
    if "liar" in request.fixturenames:
        from veridical.hooks import standing_hooks

        model = request.getfixturevalue("liar")
        assert not standing_hooks(model.model)
        assert model.rewrite is None
