"""Where the weights come from: folders of diffusers, single files, parts alone; and the modules made of them."""
