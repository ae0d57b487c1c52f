import pytest

from trawl.decompose import CP, SVD, Tucker
from trawl.errors import PlanError, RankError
from trawl.recipe import Recipe
from trawl.recipe_reader import make_recipe, read_recipe

ROLES = ("q", "k", "v", "o", "gate", "up", "down")


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("all", tuple(range(32))),
        ("28", (28,)),
        ("20-22", (20, 21, 22)),
        ("20-22,30", (20, 21, 22, 30)),
        ("3, 1-2,2", (1, 2, 3)),
        ([5, 4, 9], (4, 5, 9)),
        (range(2, 4), (2, 3)),
        (7, (7,)),
    ],
)
def test_layers(text, layers):
    assert Recipe(rank=1, layers=text).selected_layers(32) == layers


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("30-20", "the range 30-20 is reversed; write 20-30"),
        ("20-32", "the model has layers 0-31, so 20-32 is outside it"),
        ("40", "the model has layers 0-31"),
        ("-3", "cannot read '-3'"),
        ("a-b", "cannot read 'a-b'"),
        ("", "select nothing"),
    ],
)
def test_layers_outside_the_model_are_refused(text, message):
    with pytest.raises(PlanError, match=message):
        Recipe(rank=1, layers=text).selected_layers(32)


@pytest.mark.parametrize(
    ("text", "roles"),
    [
        ("all", ROLES),
        ("fc", ("gate", "up", "down")),
        ("attn", ("q", "k", "v", "o")),
        ("down,q", ("q", "down")),
        (["v", "k"], ("k", "v")),
    ],
)
def test_roles(text, roles):
    assert Recipe(rank=1, roles=text).selected_roles(ROLES) == roles


def test_roles_follow_what_the_model_has():
    ungated = ("q", "k", "v", "o", "up", "down")
    assert Recipe(rank=1, roles="fc").selected_roles(ungated) == ("up", "down")
    with pytest.raises(PlanError, match="the model has no 'gate' matrices"):
        Recipe(rank=1, roles="gate").selected_roles(ungated)
    with pytest.raises(PlanError, match="unknown role 'donw'; did you mean 'down'"):
        Recipe(rank=1, roles="donw").selected_roles(ungated)
    with pytest.raises(PlanError, match="select nothing"):
        Recipe(rank=1, roles="").selected_roles(ungated)


@pytest.mark.parametrize("budget", [{"keep": None, "size": 2000}, {"size": None, "keep": 0.5}, {"keep": 0.5}])
def test_a_budget_is_one_whatever_is_said_to_be_none(budget):
    recipe = Recipe(**budget)
    assert (recipe.method, recipe.write, recipe.output_weighting) == ("mixed", "factored", "kronecker")


def test_a_recipe_survives_yaml(tmp_path):
    for recipe in (
        Recipe(rank=64, layers="20-30", roles="fc", group_layers=2, seed=3),
        Recipe(method="tucker", rank=(3, 16, 8), tol=1e-3, n_iter_max=7),
    ):
        path = tmp_path / "recipe.yaml"
        path.write_text(recipe.to_yaml())
        assert make_recipe(read_recipe(path)) == recipe


def test_sharing_is_within_a_layer_unless_layers_are_grouped():
    shared = {"method": "svd", "rank": 3, "share": "input"}
    assert Recipe(method="svd", rank=3).group_layers == "all"
    assert Recipe(**shared).group_layers == 1
    assert Recipe(**shared, group_layers="all").group_layers == "all"
    assert make_recipe(Recipe(**shared).model_dump()) == Recipe(**shared)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"share": "input", "method": "cp"}, "joins matrices for an SVD, and the method is cp; pass --method svd"),
        ({"share": "input"}, "the method is cp"),
        ({"share": "role", "method": "svd"}, "group_layers is 1; pass --group-layers with a larger number or all"),
        ({"share": "role", "method": "svd", "group_layers": 1}, "or --share input"),
        ({"share": "all", "method": "svd"}, "share is 'all': Input should be 'none', 'input' or 'role'"),
    ],
)
def test_what_cannot_be_shared_is_refused(fields, message):
    with pytest.raises(PlanError, match=message):
        make_recipe({"rank": 3, **fields})


def test_the_method_gets_its_hyper_parameters():
    assert Recipe(rank=3, seed=5).decomposition() == CP(rank=3, seed=5)
    assert Recipe(method="svd", rank=3).decomposition() == SVD(rank=3)
    tucker = Recipe(method="tucker", rank=(2, 3, 4), n_iter_max=9, tol=0.5, engine="tensorly").decomposition()
    assert tucker == Tucker(rank=(2, 3, 4), n_iter_max=9, tol=0.5, engine="tensorly")
    with pytest.raises(RankError, match="is a triple; cp takes one integer"):
        Recipe(rank=(1, 2, 3)).decomposition()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rank": 4, "layer": "1"}, "unknown key 'layer'; did you mean 'layers'"),
        ({"rank": 4, "method": "tuker"}, "unknown method 'tuker'; did you mean 'tucker'"),
        ({"layers": "1"}, "no rank given"),
        ({"rank": "many"}, "rank is 'many'"),
        ({"rank": 4, "group_layers": 0}, "group_layers is 0; expected 'all' or a number of layers from 1"),
        ({"rank": 4, "group_layers": "some"}, "group_layers is 'some'"),
        ({"rank": 4, "seed": -1}, "seed is -1"),
        ({"rank": 4, "write": "sparse"}, "write is 'sparse'"),
        ({"rank": 4, "n_iter_max": 0}, "n_iter_max is 0"),
    ],
)
def test_bad_values_are_named(values, message):
    with pytest.raises(PlanError, match=message) as error:
        make_recipe(values, "recipe r.yaml")
    assert str(error.value).startswith("recipe r.yaml: ")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rank: [1", "not valid YAML"),
        ("- 1\n- 2", "holds list"),
        ("!!python/object/apply:os.getcwd []", "not valid YAML"),
    ],
)
def test_bad_files_are_named(text, message, tmp_path):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(PlanError, match=message):
        read_recipe(tmp_path / "r.yaml")
    with pytest.raises(PlanError, match="cannot read recipe"):
        read_recipe(tmp_path / "absent.yaml")
