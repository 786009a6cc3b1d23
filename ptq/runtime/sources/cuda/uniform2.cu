#include "instances.cuh"
Instance uniform2_product(int gs, bool asym, int path) { return product_of<U2>(gs, asym, path); }
Product uniform2_dequantize(int gs, bool asym) { return dequantize_of<U2>(gs, asym); }
