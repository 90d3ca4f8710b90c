import aioreap


async def test_runs(backend):
    p = await aioreap.create_subprocess_exec("sh", "-c", "echo hello; exit 3", stdout=aioreap.PIPE)
    assert await p.communicate() == (b"hello\n", None)
    assert p.returncode == 3
