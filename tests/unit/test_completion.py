from mxrot.commands.completion import complete_recipe


def test_recipes_are_completed_and_said_what_they_do() -> None:
    assert [name for name, _ in complete_recipe("mxrot-")] == ["mxrot-kv4", "mxrot-light", "mxrot-tuned", "mxrot-vllm"]
    assert [name for name, _ in complete_recipe("rtn,had")] == ["rtn,hadamard"]
    assert all(summary for _, summary in complete_recipe(""))
