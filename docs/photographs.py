"""Restore the faces of whole photographs: python docs/photographs.py METHOD -i PHOTOS -o OUT [--upscale 2] [--flags ...]

Finds faces, cuts each to the FFHQ template, restores them with `METHOD.py sample`, and pastes them back under a soft mask.
Needs opencv-python, and for finding faces dlib-bin with face-recognition-models (pip), whose models come along, or the five
points of your own detector: --points FILE, JSON {"photo.jpg": [[[x, y] x 5] per face]}, in the order left eye, right eye, nose,
left and right corner of the mouth (left has the smaller x). GFPGAN's and CodeFormer's tool for the same is facexlib's FaceRestoreHelper.
"""
import argparse
import importlib.util
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, ImageOps

ROOT = Path(__file__).parent.parent
NEEDED = {"cv2": "opencv-python", "dlib": "dlib-bin", "face_recognition_models": "face-recognition-models"}
FFHQ_512 = np.array([[192.98138, 239.94708], [318.90277, 240.1936], [256.63416, 314.01935], [201.26117, 371.41043],
                     [313.08905, 371.15118]])                     # facexlib's template of five points


def find_faces(picture: Image.Image) -> list:
    """[(5, 2) pixels] of the faces that dlib finds, the largest first."""
    import dlib
    models = Path(importlib.util.find_spec("face_recognition_models").submodule_search_locations[0]) / "models"
    shape = dlib.shape_predictor(str(models / "shape_predictor_68_face_landmarks.dat"))
    scale = min(1.0, 1600 / max(picture.size))                    # a face smaller than 80 px of 1600 is not looked for
    small = np.asarray(picture.convert("RGB").resize([max(1, round(n * scale)) for n in picture.size]))
    boxes = sorted(dlib.get_frontal_face_detector()(small, 1), key=lambda box: -box.area())
    points = [np.array([(p.x, p.y) for p in shape(small, box).parts()]) / scale for box in boxes]
    return [np.stack([p[36:42].mean(0), p[42:48].mean(0), p[30], p[48], p[54]]) for p in points]


def align(points, size: int):
    """The (2, 3) matrix from photograph to face; ValueError where the points are not those of a face in this order."""
    import cv2
    points, target = np.asarray(points, dtype=np.float64), FFHQ_512 * size / 512
    if points.shape != (5, 2) or not np.isfinite(points).all():
        raise ValueError("wants five (x, y) points")
    matrix, _ = cv2.estimateAffinePartial2D(points, target, method=cv2.LMEDS)
    fitted = None if matrix is None else points @ matrix[:, :2].T + matrix[:, 2]
    eyes, mouth, down = points[1] - points[0], points[4] - points[3], points[3:].mean(0) - points[:2].mean(0)
    ordered = eyes @ mouth > 0 and eyes[0] * down[1] > eyes[1] * down[0]         # left and right of either not exchanged
    if fitted is None or not ordered or np.abs(fitted - target).max() > 0.2 * size:
        raise ValueError("five points that are no face in the order left eye, right eye, nose, left, right mouth corner")
    return matrix


def paste(photo: np.ndarray, face: np.ndarray, matrix, others: list) -> None:
    """Blend a face (S, S, 3) into photo (H, W, 3), in place. A pixel belongs to the face whose centre is nearest."""
    import cv2
    size, inverse = len(face), cv2.invertAffineTransform(matrix)
    corners = np.array([[0, 0], [size, 0], [0, size], [size, size]]) @ inverse[:, :2].T + inverse[:, 2]
    left, top = np.maximum(np.floor(corners.min(0)).astype(int), 0)
    right, bottom = np.minimum(np.ceil(corners.max(0)).astype(int), photo.shape[1::-1])
    moved = inverse.copy()
    moved[:, 2] -= (left, top)                                    # only the box of this face is touched
    box = (int(right - left), int(bottom - top))
    ramp = np.minimum(1, (np.minimum(np.arange(size), np.arange(size)[::-1]) + 0.5) / (size / 8))
    mask = cv2.warpAffine((ramp[:, None] * ramp).astype(np.float32), moved, box)
    y, x = np.mgrid[top:bottom, left:right] + 0.5

    def distance(m):                                              # to the centre of a face, in units of its side
        return np.hypot(m[0, 0] * x + m[0, 1] * y + m[0, 2] - size / 2, m[1, 0] * x + m[1, 1] * y + m[1, 2] - size / 2)

    for other in others:
        mask *= distance(matrix) <= distance(other)
    patch = cv2.warpAffine(face.astype(np.float32), moved, box, flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REPLICATE)
    region = photo[top:bottom, left:right]
    region += mask[..., None] * (np.clip(patch, 0, 255) - region)


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", choices=["latent_pmrf", "honestface", "a2bfr", "pref_restore"])
    parser.add_argument("-i", "--input", required=True, help="photograph or folder of photographs")
    parser.add_argument("-o", "--output", required=True)
    parser.add_argument("--points", help="JSON of five points per face, instead of finding faces")
    parser.add_argument("--size", type=int, default=512, help="side of the cut faces: that of the network")
    parser.add_argument("--upscale", type=float, default=1.0, help="enlarge the photograph")
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[], help="what follows goes to `sample`")
    given = parser.parse_args(argv)
    wanted = [package for module, package in NEEDED.items() if not importlib.util.find_spec(module)]
    if wanted and not (given.points and importlib.util.find_spec("cv2")):
        sys.exit(f"error: pip install {' '.join(wanted)}")
    import cv2
    out, known = Path(given.output), None
    try:
        if given.points:
            known = json.loads(Path(given.points).read_text())
        files = [Path(given.input)] if Path(given.input).is_file() else sorted(p for p in Path(given.input).iterdir() if p.is_file())
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    photos, cuts = {}, out / "cut_faces"
    for path in files:
        try:
            picture = ImageOps.exif_transpose(Image.open(path))
            faces = find_faces(picture) if known is None else known.get(path.name, [])
            profile = picture.info.get("icc_profile")
            alpha = picture.convert("RGBA").getchannel("A") if picture.has_transparency_data else None
            picture = picture.convert("RGB")
            if given.upscale != 1:
                large = [round(n * given.upscale) for n in picture.size]
                picture, alpha = picture.resize(large, Image.LANCZOS), alpha and alpha.resize(large, Image.LANCZOS)
            matrices = [align(np.asarray(points) * given.upscale, given.size) for points in faces]
        except (OSError, ValueError, SyntaxError) as error:
            print(f"skipped: {path}: {error}", flush=True)
            continue
        print(f"{path.name}: {len(matrices)} face{'s' * (len(matrices) != 1)}", flush=True)
        for i, matrix in enumerate(matrices):
            if np.hypot(*matrix[0, :2]) < 0.8:                    # antialias: shrink by area first
                print(f"{path.name}: face {i} is larger than {given.size} px, its finest detail is lost", flush=True)
            blur = max(0.0, 0.5 / np.hypot(*matrix[0, :2]) - 0.5)
            source = cv2.GaussianBlur(np.asarray(picture), (0, 0), blur) if blur else np.asarray(picture)
            face = Image.fromarray(cv2.warpAffine(source, matrix, (given.size,) * 2, flags=cv2.INTER_CUBIC,
                                                  borderMode=cv2.BORDER_CONSTANT, borderValue=(135, 133, 132)))
            if profile:                                           # the network wants sRGB
                srgb = ImageCms.createProfile("sRGB")
                face = ImageCms.profileToProfile(face, ImageCms.ImageCmsProfile(io.BytesIO(profile)), srgb, outputMode="RGB")
            cuts.mkdir(parents=True, exist_ok=True)
            face.save(cuts / f"{path.stem}_{i:02d}.png")
        photos[path] = picture, alpha, profile, matrices
    if not any(matrices for *_, matrices in photos.values()):
        sys.exit("error: no face was found")
    command = [f"{given.method}.py", "sample", "-i", str(cuts.resolve()), "-o", str((out / "faces").resolve()), *given.flags]
    if subprocess.run([sys.executable, *command], cwd=ROOT).returncode:
        sys.exit(2)
    for path, (picture, alpha, profile, matrices) in photos.items():
        photo = np.array(picture, dtype=np.float32)
        for i, matrix in enumerate(matrices):
            face = Image.open(out / "faces" / "restored_faces" / f"{path.stem}_{i:02d}.png").resize((given.size,) * 2, Image.BICUBIC)
            if profile:
                srgb = ImageCms.createProfile("sRGB")
                face = ImageCms.profileToProfile(face, srgb, ImageCms.ImageCmsProfile(io.BytesIO(profile)), outputMode="RGB")
            paste(photo, np.asarray(face), matrix, matrices[:i] + matrices[i + 1:])
        result = Image.fromarray(photo.round().clip(0, 255).astype(np.uint8))
        if alpha is not None:
            result.putalpha(alpha)
        result.save(out / f"{path.stem}.png", icc_profile=profile)
    print(f"{len(photos)} photograph{'s' * (len(photos) > 1)} in {out}", flush=True)


if __name__ == "__main__":
    main()
