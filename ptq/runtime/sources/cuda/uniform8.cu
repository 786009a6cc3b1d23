#include "instances.cuh"
Instance uniform8_product(int gs, bool asym, int path) { return product_of<U8>(gs, asym, path); }
Product uniform8_dequantize(int gs, bool asym) { return dequantize_of<U8>(gs, asym); }
