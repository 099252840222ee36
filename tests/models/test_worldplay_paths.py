"""WorldPlay's pose strings, actions and the retrieval of frames by their cameras."""

import numpy as np
import pytest

from models.worldplay.cameras import CameraPath, action_ids, walk
from models.worldplay.retrieval import ball_points, select_frames


def test_retrieval_finds_the_way_back():
    path = CameraPath.from_string("right-20,right-20,left-40,w-1")
    points = ball_points(np.random.default_rng(0), 5000)
    assert np.linalg.norm(points, axis=1).max() <= 8
    chosen = select_frames(points, path.w2c_F44, 80, memory_frames=16, recent_frames=12)
    assert chosen.tolist() == [*range(4), *range(68, 80)]  # the view from where it started
    assert select_frames(points, path.w2c_F44, 12).tolist() == list(range(12))


def test_actions_and_their_ids():
    for name, motion in dict(w=9, s=18, d=27, a=36, right=1, left=2, up=3, down=4).items():
        assert CameraPath.from_string(f" {name.upper()} - 2 ,").actions_F.tolist() == [
            0,
            motion,
            motion,
        ]
    both = walk([[0.08, -0.08, 0.1, -0.1]])
    assert action_ids(both).tolist() == [0, 9 * 6 + 6]
    assert action_ids(both, third_person=True).tolist() == [0, 6]
    first = CameraPath.from_string("w-3,right-2")
    rest_F44 = walk([[0.08, 0, 0, 0]], start_44=first.c2w_F44[-1])[1:]
    assert action_ids(rest_F44, previous_44=first.c2w_F44[-1]).tolist() == [9]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("w-8,x-2", "unknown action 'x-2'"),
        ("w", "unknown action 'w'"),
        ("w--3", "unknown action 'w--3'"),
        ("w-1.5", "duration '1.5' in 'w-1.5'; accepted: a whole number"),
        ("w-0", "duration '0'"),
        ("w-nan", "duration 'nan'"),
        ("w-inf", "duration 'inf'"),
        ("w-two", "duration 'two'"),
        (" , ", "no action"),
    ],
)
def test_bad_pose_strings_say_what_is_wrong(text, said):
    with pytest.raises(ValueError, match=said):
        CameraPath.from_string(text)


def test_durations_are_cut_only_when_asked():
    path = CameraPath.from_string("w-2.9,right-0.5", durations="truncate")
    assert path.actions_F.tolist() == [0, 9, 9]
    with pytest.raises(ValueError, match="durations='round'"):
        CameraPath.from_string("w-2", durations="round")
    with pytest.raises(ValueError, match="duration 'inf'"):
        CameraPath.from_string("w-inf", durations="truncate")
