#include "instances.cuh"
Instance uniform3_product(int gs, bool asym, int path) { return product_of<U3>(gs, asym, path); }
Product uniform3_dequantize(int gs, bool asym) { return dequantize_of<U3>(gs, asym); }
