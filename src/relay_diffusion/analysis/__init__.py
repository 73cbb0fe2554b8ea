"""Analysis of images: spectra and nearest neighbours."""
