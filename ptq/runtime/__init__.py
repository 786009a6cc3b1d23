"""What runs after loading: packed linears, rounded activations, the key-value cache."""

from ptq.runtime.cpu_products import CPU_PRODUCTS
from ptq.runtime.cuda_products import CUDA_PRODUCTS
from ptq.runtime.dispatch import KERNELS
from ptq.runtime.fp8_products import FP8_PRODUCTS
from ptq.runtime.triton_products import TRITON_PRODUCTS

KERNELS[:0] = [FP8_PRODUCTS, CUDA_PRODUCTS, TRITON_PRODUCTS, CPU_PRODUCTS]
