//! Matrix products: linear layers with what was fused into them, and batches.

use pocketglm_graph::ops::{Activation, ConvNorm, FrameConv, Linear, LinearNorm, Qkv};
use pocketglm_graph::{Node, Result, Value};
use pocketglm_kernels::Variant;

use super::simple::{Other, activation};
use super::{Bound, Lowering};
use crate::plan::{COOPERATIVE_ROWS, Slot, Word, padded};
use crate::weights::{Kind, Matrix};

/// Rows of x against the matrices of the node at work.
struct Product {
    x: Bound,
    /// The same rows in half precision, padded to whole blocks.
    half: Option<Bound>,
    m: usize,
    k: usize,
    activation: Activation,
    residual: Option<Bound>,
    y: Bound,
    /// Elements of a row of y.
    stride: usize,
    /// Elements from one row of x to the next; rows may overlap.
    x_stride: usize,
}

impl Lowering<'_> {
    /// Rows and columns of a matrix, `x [.., k]` seen as `[m, k]`.
    pub fn rows_of(&self, x: Value) -> [usize; 2] {
        let k = self.shape(x).last().copied().unwrap_or(0);
        [self.elements(x) / k.max(1), k]
    }

    /// The rows of x behind their norm, where there is one; `scratch` is where they go.
    fn normed(&mut self, node: &Node, norm: Option<LinearNorm>, scratch: usize) -> Result<Bound> {
        let x = node.inputs[0];
        let Some(norm) = norm else { return self.bound(x) };
        let y = self.arena(scratch, self.elements(x))?;
        match norm {
            LinearNorm::Rms(eps) => self.norm_to(x, node.inputs[1], None, eps, y)?,
            LinearNorm::Layer(eps) => {
                self.norm_to(x, node.inputs[1], Some(Other::Bias(node.inputs[2])), eps, y)?;
            }
            LinearNorm::AddRms { inner, outer } => {
                let sum = self.result(1);
                let residual = Some(Other::Residual(x));
                self.norm(node.inputs[1], node.inputs[2], residual, inner, sum)?;
                self.norm_to(sum, node.inputs[3], None, outer, y)?;
            }
        }
        Ok(y)
    }

    pub fn linear(&mut self, node: &Node, linear: &Linear) -> Result<()> {
        if self.vector_linear(node, linear)? {
            return Ok(());
        }
        let [m, k] = self.rows_of(node.inputs[0]);
        let scratch = self.places.scratch(self.node);
        let x = self.normed(node, linear.norm, scratch)?;
        let n = self.shape(self.result(0)).last().copied().unwrap_or(0);
        let residual = match linear.residual {
            true => node.inputs.last().map(|v| self.bound(*v)).transpose()?,
            false => None,
        };
        let y = self.bound(self.result(0))?;
        let half = self.halved(node, x, [m, k])?;
        let product =
            Product { x, half, m, k, activation: linear.activation, residual, y, stride: n, x_stride: k };
        if linear.activation != Activation::SwiGlu || self.fuses_swiglu(&product) {
            return self.product(&product);
        }
        if residual.is_some() {
            return Err(self.unsupported("a residual behind SwiGLU"));
        }
        let behind = scratch + linear.norm.map_or(0, |_| padded(m * k));
        let both = self.arena(behind, 2 * m * n)?;
        self.product(&Product { activation: Activation::None, y: both, stride: 2 * n, ..product })?;
        let words = vec![m.into(), n.into(), both.at.into(), y.at.into()];
        self.element_wise(Variant::new("swiglu.wgsl"), &[(1, both.slot), (2, y.slot)], words, m * n)
    }

    pub fn qkv(&mut self, node: &Node, qkv: &Qkv) -> Result<()> {
        if self.vector_qkv(node, qkv)? {
            return Ok(());
        }
        let [t, c] = self.rows_of(node.inputs[0]);
        let at = qkv.first_weight() + qkv.parts.iter().map(|b| 1 + usize::from(*b)).sum::<usize>();
        let width = (qkv.heads + 2 * qkv.kv_heads) * qkv.head_dim;
        let y = self.bound(self.result(0))?;
        if !self.vector_heads(node, qkv)? {
            let x = self.normed(node, qkv.norm, self.places.scratch(self.node))?;
            let half = self.halved(node, x, [t, c])?;
            let activation = Activation::None;
            let product =
                Product { x, half, m: t, k: c, activation, residual: None, y, stride: width, x_stride: c };
            self.product(&product)?;
        }
        let table = self.bound(node.inputs[at])?;
        let r = self.shape(node.inputs[at]).last().copied().unwrap_or(0);
        // q and k lie side by side, so one dispatch rotates the heads of both.
        let heads = qkv.heads + qkv.kv_heads;
        self.rope_rows([y, table, y], [t, heads, qkv.head_dim, r], [width, width], qkv.rope.layout)?;
        let Some(past) = &qkv.append else { return Ok(()) };
        for (i, column) in [qkv.heads, heads].into_iter().enumerate() {
            let rows = Bound { at: y.at + column * qkv.head_dim, ..y };
            self.kv_append(rows, t, width, node.inputs[at + 1 + i], past)?;
        }
        Ok(())
    }

    pub fn frame_conv(&mut self, node: &Node, conv: &FrameConv) -> Result<()> {
        let &[frames, channels] = self.shape(node.inputs[0]) else {
            return Err(self.unsupported("frames of another rank"));
        };
        let &[out, outputs] = self.shape(self.result(0)) else {
            return Err(self.unsupported("frames of another rank"));
        };
        let (x, y) = (self.bound(node.inputs[0])?, self.bound(self.result(0))?);
        let k = conv.kernel * channels / conv.groups.max(1);
        let mut left = conv.activation;
        let product = Product {
            x,
            half: None,
            m: out,
            k,
            activation: if conv.norm.is_none() { left } else { Activation::None },
            residual: None,
            y,
            stride: outputs,
            x_stride: conv.stride * channels,
        };
        // Without groups and padding, a position is a row that overlaps with the next one.
        if conv.groups == 1 && conv.padding == [0, 0] && (self.is_tiled(&product) || self.runs().is_err()) {
            left = if conv.norm.is_none() { Activation::None } else { left };
            self.product(&product)?;
        } else {
            let sizes = [
                out * outputs,
                outputs,
                frames,
                channels,
                conv.kernel,
                conv.stride,
                conv.padding[0],
                conv.groups,
                x.at,
                y.at,
            ];
            self.grouped_conv(node, conv, [x, y], &sizes, k)?;
        }
        let at = 2 + usize::from(conv.bias);
        match conv.norm {
            None => {}
            Some(ConvNorm::Layer(eps)) => {
                let bias = Some(Other::Bias(node.inputs[at + 1]));
                self.norm_rows(y, [out, outputs], node.inputs[at], bias, eps, y)?;
            }
            Some(ConvNorm::Instance(eps)) => {
                let vectors = [node.inputs[at], node.inputs[at + 1]];
                self.instance_norm(y, [out, outputs], vectors, eps, y)?;
            }
        }
        match activation(left) {
            0 => Ok(()),
            kind => self.map_rows(y, y, out * outputs, kind, 1.0),
        }
    }

    /// A convolution with groups or padding.
    fn grouped_conv(
        &mut self,
        node: &Node,
        conv: &FrameConv,
        [x, y]: [Bound; 2],
        sizes: &[usize; 10],
        k: usize,
    ) -> Result<()> {
        let mut variant = Variant::new("frame_conv.wgsl");
        let mut slots = vec![(4, x.slot), (6, y.slot)];
        let mut words: Vec<Word> = sizes.iter().map(|&s| Word::from(s)).collect();
        let mut bias = Word::U(0);
        if conv.bias {
            let bound = self.bound(node.inputs[2])?;
            variant = variant.flag("BIAS");
            slots.push((5, bound.slot));
            bias = bound.at.into();
        }
        words.push(bias);
        match self.runs().ok().and_then(|r| r.first().copied()) {
            Some(run) => {
                let Some(matrix) = self.held.matrices.get(run.matrix).filter(|m| m.parts.len() == 1) else {
                    return Err(self.unsupported("a convolution's weight in several bindings"));
                };
                variant = matrix.form.define_zero(variant);
                slots.extend(matrix_slots(run.matrix, 0, matrix));
                words.extend(plain_words(matrix));
                words.push(Word::U(0));
            }
            None => {
                let weight = self.bound(node.inputs[1])?;
                variant = variant.flag("W_VALUES");
                slots.push((1, weight.slot));
                words.extend([k.into(), Word::U(0), Word::U(0), Word::U(0), Word::U(0), weight.at.into()]);
            }
        }
        self.element_wise(variant, &slots, words, sizes[0])
    }

    pub fn matmul(&mut self, node: &Node, transposed: bool) -> Result<()> {
        let (a, b) = (node.inputs[0], node.inputs[1]);
        let [m, k] = self.rows_of(a);
        let y = self.bound(self.result(0))?;
        let stride = self.shape(self.result(0)).last().copied().unwrap_or(0);
        if self.shape(b).len() == 2 {
            let x = self.bound(a)?;
            let activation = Activation::None;
            return self.product(&Product {
                x,
                half: None,
                m,
                k,
                activation,
                residual: None,
                y,
                stride,
                x_stride: k,
            });
        }
        let (batch, m) = (self.shape(a)[0], self.shape(a)[1]);
        let (x, w) = (self.bound(a)?, self.bound(b)?);
        let sizes = [batch, m, k, stride, x.at, w.at, y.at];
        let variant = Variant::new("matmul.wgsl").flag_if(transposed, "TRANSPOSED");
        let groups = batch * m.div_ceil(16) * stride.div_ceil(16);
        let words = sizes.iter().map(|&s| Word::from(s)).collect();
        self.dispatch(variant, &[(1, x.slot), (2, w.slot), (3, y.slot)], words, groups)
    }

    /// The matrices of the node at work.
    pub fn runs(&self) -> Result<&[crate::held::Run]> {
        match self.held.products.get(&self.node) {
            Some(runs) => Ok(runs),
            None => Err(self.unsupported("a factor that is no matrix of the checkpoint")),
        }
    }

    /// Whether the tiled kernel, which moves four values at a time, can take a product.
    fn is_tiled(&self, p: &Product) -> bool {
        p.k.is_multiple_of(4) && p.x.at.is_multiple_of(4) && p.x_stride.is_multiple_of(4)
    }

    /// Whether gate and up are one matrix in one binding, so that their product is the kernel's epilogue.
    fn fuses_swiglu(&self, p: &Product) -> bool {
        let whole = |runs: &[crate::held::Run]| match runs {
            [run] => {
                self.held.matrices.get(run.matrix).is_some_and(|m| m.parts.len() == 1) && run.bias.is_none()
            }
            _ => false,
        };
        p.residual.is_none() && self.is_tiled(p) && self.runs().is_ok_and(whole)
    }

    /// One dispatch for each part of each matrix that is bound by itself.
    fn product(&mut self, p: &Product) -> Result<()> {
        let held = self.held;
        let mut column = 0;
        for run in self.runs()?.to_vec() {
            let Some(matrix) = held.matrices.get(run.matrix) else { continue };
            for i in 0..matrix.parts.len() {
                if self.is_tiled(p) {
                    self.tiled(p, &run, matrix, i, column)?;
                } else {
                    self.plain(p, &run, matrix, i, column)?;
                }
            }
            column += run.rows;
        }
        Ok(())
    }

    /// The kernel that takes any size.
    fn plain(
        &mut self,
        p: &Product,
        run: &crate::held::Run,
        matrix: &Matrix,
        i: usize,
        column: usize,
    ) -> Result<()> {
        let (form, part) = (&matrix.form, &matrix.parts[i]);
        let mut slots = vec![(4, p.x.slot), (7, p.y.slot)];
        slots.extend(matrix_slots(run.matrix, i, matrix));
        let mut variant =
            form.define_zero(Variant::new("linear.wgsl")).value("KIND", activation(p.activation));
        if run.bias.is_some() {
            variant = variant.flag("BIAS");
            slots.push((5, Slot::Vectors));
        }
        if let Some(residual) = p.residual {
            variant = variant.flag("RESIDUAL");
            slots.push((6, residual.slot));
        }
        let sizes = [
            p.m,
            part.rows,
            p.k,
            p.x.at,
            p.y.at,
            p.stride,
            column + part.first,
            run.bias.unwrap_or(0) + part.first,
            p.residual.map_or(0, |r| r.at),
        ];
        let mut words: Vec<Word> = sizes.iter().map(|&s| Word::from(s)).collect();
        words.extend(plain_words(matrix));
        self.dispatch(variant, &slots, words, p.m.div_ceil(32) * part.rows.div_ceil(32))
    }

    /// The tiled kernels: in f32, or on cooperative matrices in f16 where weights are no better than that.
    fn tiled(
        &mut self,
        p: &Product,
        run: &crate::held::Run,
        matrix: &Matrix,
        i: usize,
        column: usize,
    ) -> Result<()> {
        let (form, part) = (&matrix.form, &matrix.parts[i]);
        let swiglu = p.activation == Activation::SwiGlu;
        let cooperative = self.is_cooperative(p.m, matrix);
        let (variant, tile) = if cooperative {
            let (variant, tile) = self.cooperative_tile(p.m, part.rows);
            (form.define_cooperative(variant), tile)
        } else {
            (form.define_zero(Variant::new("gemm.wgsl")), [64, 64])
        };
        let half = p.half.filter(|_| cooperative);
        let mut variant = variant
            .flag_if(half.is_some(), "X16")
            .flag_if(swiglu, "SWIGLU")
            .flag_if(p.activation == Activation::Silu, "SILU")
            .flag_if(p.activation == Activation::Gelu, "GELU")
            .flag_if(p.activation == Activation::Relu, "RELU");
        // Places and strides count four values of either type.
        let (x, x_at, x_stride) = match half {
            Some(half) => (half.slot, half.at / 2, form.blocks(p.k) * 8),
            None => (p.x.slot, p.x.at / 4, p.x_stride / 4),
        };
        let mut slots = vec![(4, x), (5, p.y.slot)];
        slots.extend(matrix_slots(run.matrix, i, matrix));
        if run.bias.is_some() {
            variant = variant.flag("BIAS");
            slots.push((6, Slot::Vectors));
        }
        if let Some(residual) = p.residual {
            variant = variant.flag("RESIDUAL");
            slots.push((7, residual.slot));
        }
        let rows = if swiglu { part.rows / 2 } else { part.rows };
        let columns = if swiglu { tile[1] / 2 } else { tile[1] };
        let (k, tiles) = (matrix.k, p.m.div_ceil(tile[0]));
        // The bias is indexed by the row of the whole matrix, which begins at a multiple of four.
        let words = vec![
            p.m.into(),
            rows.into(),
            form.blocks(k).into(),
            form.groups(k).into(),
            Word::U(form.shift()),
            matrix.factor.into(),
            p.k.into(),
            (run.bias.unwrap_or(0) / 4).into(),
            x_at.into(),
            x_stride.into(),
            (p.y.at + column).into(),
            p.stride.into(),
            p.residual.map_or(0, |r| r.at + column).into(),
            p.stride.into(),
            part.first.into(),
            tiles.into(),
            Word::U(0),
        ];
        self.dispatch(variant, &slots, words, tiles * rows.div_ceil(columns))
    }

    /// Whether a product runs on cooperative matrices: weights in f32 would lose what they have beyond half precision.
    fn is_cooperative(&self, m: usize, matrix: &Matrix) -> bool {
        self.device.cooperative() && matrix.form.kind != Kind::F32 && m >= COOPERATIVE_ROWS
    }

    /// The kernel and its tile for `m` rows of x and `n` of a matrix. Larger tiles read less, smaller ones keep more of
    /// the device busy; the choice follows measurements on 132 multiprocessors with 48 KiB of workgroup memory.
    fn cooperative_tile(&self, m: usize, n: usize) -> (Variant, [usize; 2]) {
        let limit = self.device.limits.max_compute_workgroup_storage_size;
        let small = m.div_ceil(128) * n.div_ceil(128);
        match () {
            () if m <= 64 || limit < 32 << 10 => (Variant::new("gemm_coop_m64.wgsl"), [64, 128]),
            () if limit < 46 << 10 => (Variant::new("gemm_coop.wgsl"), [128, 128]),
            () if m >= 256 && small > 132 => {
                (Variant::new("gemm_coop.wgsl").value("WG", 512).value("SLOTS", 2), [256, 128])
            }
            () => (Variant::new("gemm_coop_db.wgsl"), [128, 128]),
        }
    }

    /// The rows of x in half precision, behind the node's other working memory, where a matrix of the node is multiplied
    /// on cooperative matrices.
    fn halved(&mut self, node: &Node, x: Bound, [m, k]: [usize; 2]) -> Result<Option<Bound>> {
        let cooperative = |r: &crate::held::Run| {
            self.held.matrices.get(r.matrix).is_some_and(|matrix| self.is_cooperative(m, matrix))
        };
        let wanted = self.runs().is_ok_and(|runs| runs.iter().any(cooperative));
        if !wanted || !k.is_multiple_of(4) || !x.at.is_multiple_of(4) {
            return Ok(None);
        }
        let inputs: Vec<Vec<usize>> = node.inputs.iter().map(|v| self.shape(*v).to_vec()).collect();
        let size = crate::plan::half_rows(node, &inputs);
        let scratch = self.places.plan.scratch_of(self.node);
        let from = self.places.scratch(self.node) + (scratch.end - scratch.start) - size;
        let half = self.arena(from, size)?;
        let padded = k.next_multiple_of(32) / 4;
        let sizes = [m, k / 4, padded, x.at / 4, k / 4, half.at / 2];
        let words = sizes.iter().map(|&s| Word::from(s)).collect();
        let slots = [(1, x.slot), (2, half.slot)];
        self.dispatch(Variant::new("to_f16.wgsl"), &slots, words, (m * padded).div_ceil(256))?;
        Ok(Some(half))
    }

    pub fn gather_rows(&mut self, node: &Node) -> Result<()> {
        let (table, ids) = (node.inputs[0], node.inputs[1]);
        let [total, c] = *self.shape(table) else { return Err(self.unsupported("a table of another rank")) };
        let n = self.elements(ids);
        let (ids, y) = (self.bound(ids)?, self.bound(self.result(0))?);
        let (root, _) = self.places.plan.root(table);
        let held = self.held;
        let Some(&key) = held.tables.get(&root.node()) else {
            return self.gather_values(table, [ids, y], [n, total, c]);
        };
        let Some(matrix) = held.matrices.get(key) else { return Ok(()) };
        for (i, part) in matrix.parts.iter().enumerate() {
            let mut slots = vec![(4, ids.slot), (5, y.slot)];
            slots.extend(matrix_slots(key, i, matrix));
            let sizes = [n, c, part.first, part.rows, total, ids.at, y.at];
            let mut words: Vec<Word> = sizes.iter().map(|&s| Word::from(s)).collect();
            words.extend(plain_words(matrix));
            let variant = matrix.form.define_zero(Variant::new("gather_rows.wgsl"));
            self.element_wise(variant, &slots, words, n * c)?;
        }
        Ok(())
    }

    /// Rows of a value that the run computed.
    fn gather_values(&mut self, table: Value, [ids, y]: [Bound; 2], [n, total, c]: [usize; 3]) -> Result<()> {
        let table = self.bound(table)?;
        let sizes = [n, c, 0, total, total, ids.at, y.at, c, 0, 0, 0, 0, table.at];
        let words = sizes.iter().map(|&s| Word::from(s)).collect();
        let slots = [(1, table.slot), (4, ids.slot), (5, y.slot)];
        self.element_wise(Variant::new("gather_rows.wgsl").flag("W_VALUES"), &slots, words, n * c)
    }
}

/// Bindings 1 to 3: the arrays of part `i` of a matrix.
pub(super) fn matrix_slots(key: usize, i: usize, matrix: &Matrix) -> Vec<(u32, Slot)> {
    let part = &matrix.parts[i];
    let arrays = [true, part.scales.is_some(), part.minima.is_some()];
    (0..3).filter(|&w| arrays[w]).map(|w| (w as u32 + 1, Slot::Matrix { key, part: i, which: w })).collect()
}

/// What kernels that take any size are told of a matrix, in the order of their parameters.
fn plain_words(matrix: &Matrix) -> Vec<Word> {
    let form = &matrix.form;
    vec![
        matrix.k.into(),
        form.blocks(matrix.k).into(),
        form.groups(matrix.k).into(),
        Word::U(form.shift()),
        matrix.factor.into(),
    ]
}
