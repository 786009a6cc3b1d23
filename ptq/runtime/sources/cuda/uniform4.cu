#include "instances.cuh"
Instance uniform4_product(int gs, bool asym, int path) { return product_of<U4>(gs, asym, path); }
Product uniform4_dequantize(int gs, bool asym) { return dequantize_of<U4>(gs, asym); }
