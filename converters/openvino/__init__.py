"""The OpenVINO form: graphs in the layout of optimum-intel."""
