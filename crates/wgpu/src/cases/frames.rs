//! Convolution over frames and norms over time: what speech encoders are made of besides layers that others have too.

use pocketglm_graph::Result;
use pocketglm_graph::ops::UnaryKind;
use pocketglm_tensor::{Affine, Block, DType, Group};

use super::Case;
use super::comparison::bounds::{F32, INT8_ACTIVATIONS};
use super::draft::{About, Fill};
use super::products::scales_bound;

pub(super) fn cases(list: &mut Vec<Case>) -> Result<()> {
    instance_norm(list)?;
    frame_conv(list)
}

fn instance_norm(list: &mut Vec<Case>) -> Result<()> {
    for (t, c) in [(2, 1), (7, 63), (130, 65), (1030, 5)] {
        for fill in Fill::EACH {
            let form = format!("{c} channels over {t} frames, {} values", fill.name());
            // The variance of equal values is what rounding leaves of it, so only exact results can be compared.
            let fill = if fill == Fill::Equal { Fill::Zero } else { fill };
            list.push(About::new("instance_norm", form, F32).filled(fill).build(|d, g| {
                let x = d.x(g, "x", &[t, c])?;
                d.vector("n.weight", c, Fill::Positive)?;
                d.vector("n.bias", c, Fill::Spread)?;
                g.instance_norm("n", x, 1e-5)
            })?);
        }
    }
    Ok(())
}

/// What follows the convolution and is fused into it.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Norm {
    None,
    Layer,
    Instance,
}

fn frame_conv(list: &mut Vec<Case>) -> Result<()> {
    // Frames, channels, outputs; kernel and stride; padding; groups.
    type Shape = ([usize; 3], [usize; 2], [usize; 2], usize);
    let shapes: [Shape; 7] = [
        ([10, 1, 6], [10, 5], [0, 0], 1),
        ([203, 1, 16], [10, 5], [0, 0], 1),
        ([67, 16, 16], [3, 2], [0, 0], 1),
        ([70, 20, 33], [2, 2], [0, 0], 1),
        ([37, 32, 32], [16, 1], [8, 7], 4),
        ([35, 12, 18], [5, 1], [2, 2], 6),
        ([3, 8, 8], [3, 1], [1, 1], 1),
    ];
    // What int8 encoders are kept in.
    let int8 = Affine::new(8, Group::Row, true).map_or(DType::F32, DType::Affine);
    for (sizes @ [t, c, o], [kernel, stride], padding, groups) in shapes {
        let k = kernel * c / groups;
        let of_groups: &[DType] = match groups {
            1 => &[DType::F32, DType::F16, DType::Block(Block::Q8_0), int8],
            // Codes of four channels are multiplied at a time.
            _ if (c / groups).is_multiple_of(4) => &[DType::F32, int8],
            _ => &[DType::F32],
        };
        for &dtype in of_groups {
            if matches!(dtype, DType::Block(_)) && k % 32 != 0 {
                continue;
            }
            for (norm, kind, bias) in [
                (Norm::None, None, false),
                (Norm::None, Some(UnaryKind::Gelu), true),
                (Norm::Layer, Some(UnaryKind::Gelu), true),
                (Norm::Instance, Some(UnaryKind::Gelu), false),
                (Norm::Instance, None, true),
            ] {
                let frames = (t + padding[0] + padding[1] - kernel) / stride + 1;
                // A norm over one frame is of nothing.
                if norm == Norm::Instance && frames == 1 {
                    continue;
                }
                let form = format!(
                    "{dtype}, {sizes:?}, kernel {kernel} by {stride}, padding {padding:?}, {groups} groups, {norm:?}, {kind:?}{}",
                    if bias { ", bias" } else { "" }
                );
                let bound = match frames == 1 && dtype.is_quantised() {
                    true => INT8_ACTIVATIONS,
                    false => scales_bound(dtype),
                };
                let fused = match (norm, kind) {
                    (Norm::None, None) => "frame_conv",
                    (Norm::None, Some(_)) => "frame_conv_act",
                    (_, None) => "frame_conv_norm",
                    (_, Some(_)) => "frame_conv_norm_act",
                };
                list.push(About::new("frame_conv", form, bound).fused(&[fused]).build(|d, g| {
                    let x = d.x(g, "x", &[t, c])?;
                    d.matrix("w", dtype, [o, k])?;
                    let w = g.weight("w", &[o, k])?;
                    let b = if bias { Some(d.tensor(g, "b", &[o])?) } else { None };
                    let y = g.frame_conv_by(x, w, b, [kernel, stride], padding, groups)?;
                    let y = match norm {
                        Norm::None => y,
                        Norm::Layer | Norm::Instance => {
                            d.vector("n.weight", o, Fill::Positive)?;
                            d.vector("n.bias", o, Fill::Spread)?;
                            if norm == Norm::Layer {
                                g.layer_norm("n", y, 1e-5)?
                            } else {
                                g.instance_norm("n", y, 1e-5)?
                            }
                        }
                    };
                    kind.map_or(Ok(y), |kind| g.unary(kind, y))
                })?);
            }
        }
    }
    Ok(())
}
