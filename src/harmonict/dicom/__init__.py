"""DICOM in and out: the only home of pydicom."""
