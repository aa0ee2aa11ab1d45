"""The declarations of the supported families, one small file each."""
