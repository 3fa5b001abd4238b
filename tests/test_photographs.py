"""docs/photographs.py: the matrix of five points, and pasting. Skipped without OpenCV, which only that script needs."""
import importlib.util
from pathlib import Path

import numpy as np
import pytest

cv2 = pytest.importorskip("cv2")
spec = importlib.util.spec_from_file_location("photographs", Path(__file__).parent.parent / "docs" / "photographs.py")
photographs = importlib.util.module_from_spec(spec)
spec.loader.exec_module(photographs)


def placed(scale, angle, x, y, size=64):
    """Five points of a face that stands at (x, y), turned and scaled, and the matrix that brings it back."""
    turn = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    points = photographs.FFHQ_512 * size / 512 @ turn.T + (x, y)
    back = np.linalg.inv(turn)
    return points, np.column_stack([back, -back @ (x, y)])


def test_five_points_give_the_similarity_that_placed_them_and_a_wrong_order_is_refused():
    points, matrix = placed(1.7, 0.3, 40, 25)
    assert np.allclose(photographs.align(points, 64), matrix, atol=1e-3)
    exchanged = [points[order] for order in ([1, 0, 2, 3, 4], [0, 1, 2, 4, 3], [1, 0, 2, 4, 3], [3, 4, 2, 0, 1])]
    for wrong in (*exchanged, points[:3], points * np.nan):
        with pytest.raises(ValueError):
            photographs.align(wrong, 64)


def test_a_face_lands_where_it_was_cut_and_nothing_else_changes():
    y, x = np.mgrid[:200, :240]
    photo = np.stack([x, y, (x + y) / 2], -1).astype(np.float32)          # smooth, so cutting and pasting loses nothing
    points, matrix = placed(1.0, 0.2, 80, 60)
    face = cv2.warpAffine(photo, matrix, (64, 64), flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REPLICATE)
    same, brighter = photo.copy(), photo.copy()
    photographs.paste(same, face, matrix, [])
    photographs.paste(brighter, face + 20, matrix, [])
    assert np.abs(same - photo).max() < 1
    centre = np.linalg.inv(matrix[:, :2]) @ (np.array([32, 32]) - matrix[:, 2])
    assert abs((brighter - photo)[int(centre[1]), int(centre[0])].mean() - 20) < 1
    far = np.hypot(x - centre[0], y - centre[1]) > 32 * 2 ** 0.5 + 2
    assert (brighter == photo)[far].all()


def test_faces_cheek_to_cheek_keep_their_own_pixels_and_one_over_the_edge_is_pasted():
    photo = np.zeros((64, 100, 3), np.float32)
    first, second = placed(1.0, 0.0, 0, 0)[1], placed(1.0, 0.0, 30, 0)[1]   # centres at 32 and 62: the border is 47
    photographs.paste(photo, np.full((64, 64, 3), 100, np.float32), first, [second])
    assert (photo[:, 48:] == 0).all() and photo[32, 40].min() > 90
    photographs.paste(photo, np.full((64, 64, 3), 200, np.float32), placed(1.0, 0.0, 70, 20)[1], [])
    assert photo[50, 95].min() > 150
