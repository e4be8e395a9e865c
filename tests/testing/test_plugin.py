"""The pytest plugin, run in pytest runs of its own."""

import textwrap

import hypothesis  # noqa: F401  each inner run would import it anew, its plugin needs it
import pytest

PLUGIN = "-pdistclip.testing.plugin"


@pytest.fixture
def run(pytester):
    """Run pytest in this process on a test file, so that its ranks are warm already."""

    def run(source, *arguments, **files):
        pytester.makepyfile(test_it=textwrap.dedent(HEADER) + textwrap.dedent(source), **files)
        return pytester.runpytest_inprocess(
            PLUGIN, "-pno:cacheprovider", "-pno:randomly", *arguments
        )

    return run


HEADER = """
    import os
    import pytest, torch, torch.distributed as dist
"""


def test_once_per_world_size_on_every_rank(run):
    result = run(
        """
        @pytest.mark.ranks(1, 2, 3)
        def test_sum(world_size):
            one = torch.ones(())
            dist.all_reduce(one)
            assert one.item() == world_size == dist.get_world_size()

        @pytest.mark.ranks(2)
        def test_without_the_argument():
            assert dist.get_world_size() == 2

        def test_plain():
            assert not dist.is_initialized()
        """,
        "-v",
    )
    result.assert_outcomes(passed=5)
    result.stdout.fnmatch_lines(["*test_sum?1rank? PASSED*", "*test_sum?2ranks? PASSED*"])


def test_fixtures_and_parameters_travel(run):
    result = run(
        """
        @pytest.fixture
        def table():
            return {"x": torch.arange(3)}

        @pytest.mark.parametrize("value", [1, torch.float64], ids=["one", "dtype"])
        @pytest.mark.ranks(2)
        def test_it(tmp_path, table, value, world_size):
            (tmp_path / str(dist.get_rank())).write_text("here")
            dist.barrier()
            assert len(list(tmp_path.iterdir())) == 2
            assert table["x"].tolist() == [0, 1, 2]
            assert value in (1, torch.float64)

        @pytest.mark.ranks(2)
        class TestClass:
            attribute = 5

            def setup_method(self):
                self.made = 6

            def test_method(self, world_size):
                assert (self.attribute, self.made) == (5, 6)
        """
    )
    result.assert_outcomes(passed=3)


def test_a_failure_shows_rank_values_and_traceback_and_no_more(run):
    result = run(
        """
        def helper(found):
            assert found == [1, 3]

        @pytest.mark.ranks(2)
        def test_it():
            print("from rank", dist.get_rank())
            if dist.get_rank() == 1:
                helper([1, 2])

        @pytest.mark.ranks(2)
        def test_after():
            dist.barrier()
        """
    )
    result.assert_outcomes(failed=1, passed=1)
    result.stdout.fnmatch_lines(
        [
            "*rank 1 of 2 raised AssertionError: assert ?1, 2? == ?1, 3?*",
            "*in test_it*",
            "*in helper*",
            "*from rank 1*",
            "*rank 0: returned None*",
            "FAILED test_it.py::test_it?2ranks?*rank 1 of 2*",
        ]
    )
    result.stdout.no_fnmatch_line("*pool.py*")
    result.stdout.no_fnmatch_line("*plugin.py*")


def test_limits_of_marker_and_configuration(run, pytester):
    pytester.makeini("[pytest]\ndistclip_rank_timeout = 1.5")
    result = run(
        """
        import time
        def hang():
            if dist.get_rank() == 0:
                dist.barrier()

        @pytest.mark.ranks(2)
        def test_default():
            hang()

        @pytest.mark.ranks(2, timeout=1.2)
        def test_own():
            hang()

        @pytest.mark.ranks(1, timeout=60)
        def test_longer():
            time.sleep(1.6)
        """
    )
    result.assert_outcomes(failed=2, passed=1)
    result.stdout.fnmatch_lines(
        ["*no answer within 1.5 s from rank 0 of 2*", "*no answer within 1.2 s from rank 0 of 2*"]
    )


def test_skips_and_expected_failures(run):
    result = run(
        """
        @pytest.mark.ranks(2)
        def test_all():
            pytest.skip("not here")

        @pytest.mark.ranks(2)
        def test_one():
            if dist.get_rank() == 0:
                pytest.skip("not there")

        @pytest.mark.ranks(2)
        def test_xfail():
            pytest.xfail("known")

        @pytest.mark.xfail
        @pytest.mark.ranks(2)
        def test_marked():
            assert False

        @pytest.mark.skip
        @pytest.mark.ranks(2)
        def test_skip_mark():
            assert False
        """,
        "-rs",
    )
    result.assert_outcomes(skipped=2, failed=1, xfailed=2)
    result.stdout.fnmatch_lines(["SKIPPED * test_it.py:*: not here"])


def test_a_patch_made_on_the_ranks_is_undone_there(run):
    result = run(
        """
        import math

        @pytest.mark.ranks(2)
        def test_patched(monkeypatch):
            monkeypatch.setattr(math, "tau", 0.0)
            assert math.tau == 0.0

        @pytest.mark.ranks(2)
        def test_not_any_more():
            assert math.tau > 6.0
        """
    )
    result.assert_outcomes(passed=2)


def test_what_cannot_travel_is_named(run):
    result = run(
        """
        @pytest.fixture
        def lock():
            import threading
            return threading.Lock()

        @pytest.mark.ranks(2)
        def test_it(lock):
            pass

        @pytest.mark.ranks(2)
        def test_returning():
            return 1
        """
    )
    result.assert_outcomes(failed=2)
    result.stdout.fnmatch_lines(
        ["*fixture 'lock' cannot be sent to the ranks*", "*a test returns None, not int*"]
    )


@pytest.mark.parametrize(
    ("mark", "text"),
    [
        ("ranks()", "*ranks() takes world sizes*"),
        ("ranks(0)", "*ranks() takes world sizes*"),
        ("ranks('2')", "*ranks() takes world sizes*"),
        ("ranks(2, limit=3)", "*ranks() does not take*limit*"),
    ],
)
def test_a_wrong_marker_is_an_error(run, mark, text):
    result = run(
        f"""
        @pytest.mark.{mark}
        def test_it():
            pass
        """
    )
    assert result.ret != 0
    result.stdout.fnmatch_lines([text])


def test_world_size_needs_the_marker(run):
    result = run("def test_it(world_size): pass")
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*world_size needs @pytest.mark.ranks*"])


def test_hypothesis_is_told_where_to_go(run):
    result = run(
        """
        from hypothesis import given, settings, strategies as st
        from distclip.testing import run_on_ranks

        @pytest.mark.ranks(2)
        @given(st.integers())
        def test_on_ranks(n):
            pass

        @settings(max_examples=10, deadline=None, database=None)
        @given(st.integers(0, 9))
        def test_in_main(n):
            assert run_on_ranks(lambda: n + dist.get_rank(), 2) == [n, n + 1]
        """
    )
    result.assert_outcomes(failed=1, passed=1)
    result.stdout.fnmatch_lines(["*run_on_ranks in the test*"])


def test_modules_that_cannot_be_imported_by_name(pytester):
    """In a process of its own, with nothing of the suite on its sys.path."""
    directory = pytester.mkdir("suite") / "deep"
    directory.mkdir()
    (directory / "test_deep.py").write_text(
        textwrap.dedent(
            """
            import os
            import pytest
            import torch.distributed as dist
            from distclip.testing import run_on_ranks

            class Thing:
                pass

            def helper(x):
                return x, dist.get_rank()

            @pytest.fixture
            def thing():
                return Thing()

            @pytest.mark.ranks(2)
            def test_marked(thing, tmp_path):
                assert isinstance(thing, Thing)
                assert helper(1) == (1, dist.get_rank())

            def test_called():
                assert run_on_ranks(helper, 2, 3) == [(3, 0), (3, 1)]

            @pytest.mark.ranks(2)
            def test_failing():
                value = [1, 2]
                assert value == [3]
            """
        )
    )
    (directory / "conftest.py").write_text('pytest_plugins = ["distclip.testing.plugin"]')
    pytester.makeini("[pytest]\naddopts = --confcutdir=.")
    result = pytester.runpytest_subprocess(
        "--import-mode=importlib", "-pno:cacheprovider", "suite/deep"
    )
    result.assert_outcomes(passed=2, failed=1)
    result.stdout.fnmatch_lines(["*assert [[]1, 2] == [[]3]*"])


def test_a_changed_test_file_is_loaded_again(run):
    for number in (1, 2):
        result = run(
            f"""
            NUMBER = {number}
            @pytest.mark.ranks(2)
            def test_it():
                assert NUMBER == {number}, "stale"
            """
        )
        result.assert_outcomes(passed=1)


def test_stop_at_first(run):
    result = run(
        """
        @pytest.mark.ranks(1, 2)
        def test_it():
            assert False
        """,
        "-x",
    )
    result.assert_outcomes(failed=1)


def test_a_debugger_in_a_rank_does_not_hang(run):
    result = run(
        """
        @pytest.mark.ranks(2)
        def test_it():
            breakpoint()
        """
    )
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*BdbQuit*"])
