"""A trial of round patients whose kernels are Gaussians, so the filter from one to the other is known; and a plan."""

import numpy as np
from scipy import ndimage

from harmonict.core import Geometry
from harmonict.core.cohort import cohort_table, write_cohort
from harmonict.volumes import write_mask
from make_dicom import make_ct_series
from toy import toy_series

BLUR_PIXELS = {"Bl64": 0.5, "Br40": 0.9, "Bl57": 0.5}  # Bl57 is the target once more
RENDITIONS = (  # kernel, strength, dose, thickness
    ("Bl64", 0.0, 6.5, 1.0),
    ("Br40", 0.0, 6.5, 1.0),
    ("Br40", 3.0, 6.5, 1.0),
    ("Br40", 0.0, 1.3, 3.0),
    ("Bl57", 0.0, 6.5, 1.0),
)
PLAN = """
trial = "cohort.csv"
target = "Bl64"
sources = ["Br40", "Bl57"]
rois = 3
slices = 3

[[model]]
name = "identity"
method = "identity"

[[model]]
name = "ratio"
method = "mtf-ratio"
each = "protocol"

[[model]]
name = "not there"
method = "no-such-method"
"""


def write_toy_trial(root):
    """Three training patients and two test patients with a nodule; the noise of all renditions is shared."""
    rows = []
    for number, patient in enumerate("abcxy"):
        masks = ""
        for kernel, strength, dose, thickness in RENDITIONS:
            count = round(3 / thickness)
            noise_hu = 24 if strength else 60
            toy = toy_series(blur_mm=0.6, noise_hu=noise_hu, slices=3, size=128, pixel_mm=2.2, seed=number).hu
            blurred = ndimage.gaussian_filter(toy, (0, BLUR_PIXELS[kernel], BLUR_PIXELS[kernel]))
            hu = blurred.reshape(count, -1, 128, 128).mean(1)
            name = f"{patient}-{kernel}-{strength:g}-{dose:g}-{thickness:g}"
            make_ct_series(
                root / name,
                hu=np.round(hu),
                signed=True,
                intercept=0,
                spacing_mm=(thickness, 2.2, 2.2),
                origin_mm=(0.0, 0.0, thickness / 2),
                patient=patient,
                kernel=kernel,
                series_uid=f"1.2.{number}.{len(rows)}",
            )
            if kernel == "Bl64":
                nodule = np.zeros((3, 128, 128), bool)
                nodule[1, 60:68, 60:66] = True
                path = root / f"{patient}-nodule.nii.gz"
                write_mask(nodule, Geometry((0.0, 0.0, 0.5), (1.0, 2.2, 2.2)), path)
                masks = f"nodule_1={path.name}"
            rows.append(
                {
                    "path": str(root / name),
                    "patient": patient,
                    "series": f"1.2.{number}.{len(rows)}",
                    "format": "dicom",
                    "role": "target" if kernel == "Bl64" else "source",
                    "kernel": kernel,
                    "iterative_strength": strength,
                    "ctdivol_mgy": dose,
                    "slice_thickness_mm": thickness,
                    "masks": masks,
                    "state": "done",
                    "split": "train" if patient in "abc" else "test",
                }
            )
    write_cohort(cohort_table(rows), root / "cohort.csv")
    return root
