"""Work beside this process: its result, its error, and its end."""

import os
import signal
import sys

import pytest

from dimaskdino.data.parallel import in_background
from dimaskdino.errors import DatasetError

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are forked on Linux")


@pytest.mark.parametrize("worth_it", [False, True])
def test_the_result_comes_from_another_process_if_it_is_worth_it(worth_it: bool) -> None:
    with in_background(os.getpid, worth_it=worth_it) as result:
        assert (result() != os.getpid()) == worth_it


@pytest.mark.parametrize("worth_it", [False, True])
def test_an_error_is_raised_where_the_result_is_asked_for(worth_it: bool) -> None:
    def fail() -> None:
        raise DatasetError("image 3 is broken")

    with in_background(fail, worth_it=worth_it) as result, pytest.raises(DatasetError, match="image 3 is broken"):
        result()


def test_work_whose_process_is_killed_is_done_here() -> None:
    here = os.getpid()

    def work() -> int:
        if os.getpid() != here:
            os.kill(os.getpid(), signal.SIGKILL)
        return here

    with in_background(work, worth_it=True) as result:
        assert result() == here


def test_the_process_ends_with_the_block() -> None:
    begun, wrote = os.pipe()

    def work() -> None:
        os.write(wrote, str(os.getpid()).encode())
        signal.pause()

    with in_background(work, worth_it=True):
        process = int(os.read(begun, 20))
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)
