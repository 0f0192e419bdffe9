"""The recipe of the embedded model: data, autoencoder, text, unet, publish; a file each."""
