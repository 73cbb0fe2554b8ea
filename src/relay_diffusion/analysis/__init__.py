"""Analysis of images: spectra and nearest neighbors."""
