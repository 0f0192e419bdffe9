"""Weights -> variants: conversion, quantization, parity, and the training of the embedded model."""
