//! The evaluator: walks the syntax tree, paying for every step and every byte from one budget.

use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;

use minijinja::machinery::ast::{self, BinOpKind, CompareOpKind, Expr, Stmt, UnaryOpKind};

use super::value::{Entries, List, Loop, Value};
use crate::error::{Error, Result, clip};
use crate::limits;

/// Renders a parsed template. `input` is the number of text bytes in the variables.
pub(super) fn render(tree: &Stmt<'_>, root: Vec<(String, Value)>, input: usize) -> Result<String> {
    let fuel = limits::TEMPLATE_BASE_FUEL + limits::TEMPLATE_FUEL_PER_INPUT_BYTE * input as u64;
    let globals = root.into_iter().collect();
    let mut interp = Interp {
        fuel,
        limit: fuel,
        depth: 0,
        line: 1,
        globals,
        scopes: vec![HashMap::new()],
        macros: Vec::new(),
    };
    let mut out = String::new();
    match tree {
        Stmt::Template(t) => interp.exec_block(&t.children, &mut out)?,
        other => interp.exec(other, &mut out)?,
    };
    Ok(out)
}

/// How a block ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Flow {
    Next,
    Break,
    Continue,
}

pub(super) struct Interp<'t, 's> {
    /// What is left of the budget.
    fuel: u64,
    limit: u64,
    /// Nesting of statements, expressions and macro calls.
    depth: usize,
    /// Line of the statement that is running.
    line: usize,
    /// Variables given by the caller.
    globals: HashMap<String, Value>,
    /// Variables set by the template, innermost scope last.
    scopes: Vec<HashMap<&'s str, Value>>,
    macros: Vec<&'t ast::Macro<'s>>,
}

/// Evaluated arguments of a call. They are taken in the order of the callee's signature.
pub(super) struct Args {
    positional: std::vec::IntoIter<Value>,
    named: Vec<(String, Value)>,
}

impl Args {
    /// No arguments.
    pub(super) fn none() -> Self {
        Self::of(None)
    }

    /// At most one positional argument.
    pub(super) fn of(value: Option<Value>) -> Self {
        Self { positional: Vec::from_iter(value).into_iter(), named: Vec::new() }
    }

    /// The next argument given by position.
    pub(super) fn take_positional(&mut self) -> Option<Value> {
        self.positional.next()
    }

    /// The next argument, by position or by name.
    pub(super) fn take(&mut self, name: &str) -> Option<Value> {
        self.positional.next().or_else(|| {
            let at = self.named.iter().position(|(n, _)| n == name)?;
            Some(self.named.swap_remove(at).1)
        })
    }
}

impl<'t, 's> Interp<'t, 's> {
    pub(super) fn error<T>(&self, detail: impl Into<String>) -> Result<T> {
        Err(Error::TemplateRender { line: self.line, detail: clip(&detail.into(), 200) })
    }

    /// Pays for `bytes` that are about to be created.
    pub(super) fn charge(&mut self, bytes: u64) -> Result<()> {
        match self.fuel.checked_sub(bytes) {
            Some(left) => {
                self.fuel = left;
                Ok(())
            }
            None => Err(Error::TemplateBudget { line: self.line, what: "fuel", limit: self.limit }),
        }
    }

    /// Makes a text, paying for it.
    pub(super) fn text(&mut self, s: &str) -> Result<Value> {
        self.charge(s.len() as u64)?;
        Ok(Value::str(s))
    }

    /// Makes a list, paying for its slots.
    pub(super) fn list(&mut self, items: Vec<Value>, tuple: bool) -> Result<Value> {
        self.charge(64 * items.len() as u64 + 64)?;
        Value::list(items, tuple).or_else(|e| self.error(e))
    }

    /// The value as `str()` gives it.
    pub(super) fn text_of(&mut self, value: &Value) -> Result<Rc<str>> {
        if let Value::Str(s) = value {
            return Ok(s.clone());
        }
        self.charge(value.weight())?;
        let mut out = String::new();
        value.write_str(&mut out);
        Ok(out.into())
    }

    fn emit(&mut self, s: &str, out: &mut String) -> Result<()> {
        self.charge(s.len() as u64)?;
        if out.len() + s.len() > limits::MAX_TEMPLATE_OUTPUT_BYTES {
            let limit = limits::MAX_TEMPLATE_OUTPUT_BYTES as u64;
            return Err(Error::TemplateBudget { line: self.line, what: "output bytes", limit });
        }
        out.push_str(s);
        Ok(())
    }

    /// Runs `body` one level deeper, or fails when that is too deep.
    fn nested<T>(&mut self, body: impl FnOnce(&mut Self) -> Result<T>) -> Result<T> {
        self.charge(limits::TEMPLATE_STEP_FUEL)?;
        if self.depth >= limits::MAX_TEMPLATE_DEPTH {
            let limit = limits::MAX_TEMPLATE_DEPTH as u64;
            return Err(Error::TemplateBudget { line: self.line, what: "nesting depth", limit });
        }
        self.depth += 1;
        let result = body(self);
        self.depth -= 1;
        result
    }

    fn exec_block(&mut self, body: &'t [Stmt<'s>], out: &mut String) -> Result<Flow> {
        for stmt in body {
            match self.nested(|this| this.exec(stmt, out))? {
                Flow::Next => {}
                other => return Ok(other),
            }
        }
        Ok(Flow::Next)
    }

    /// Runs a block and returns its output.
    fn capture(&mut self, body: &'t [Stmt<'s>]) -> Result<Value> {
        let mut out = String::new();
        self.exec_block(body, &mut out)?;
        self.text(&out)
    }

    fn exec(&mut self, stmt: &'t Stmt<'s>, out: &mut String) -> Result<Flow> {
        match stmt {
            Stmt::EmitRaw(raw) => self.emit(raw.raw, out)?,
            Stmt::EmitExpr(e) => {
                self.line = usize::from(e.span().start_line);
                let value = self.eval(&e.expr)?;
                let text = self.text_of(&value)?;
                self.emit(&text, out)?;
            }
            Stmt::IfCond(cond) => return self.exec_if(cond, out),
            Stmt::ForLoop(f) => {
                self.line = usize::from(f.span().start_line);
                return self.exec_for(f, out);
            }
            Stmt::Set(set) => {
                self.line = usize::from(set.span().start_line);
                let value = self.eval(&set.expr)?;
                self.assign(&set.target, value)?;
            }
            Stmt::SetBlock(set) => {
                self.line = usize::from(set.span().start_line);
                if set.filter.is_some() {
                    return self.error("a set block with a filter is not supported");
                }
                self.scopes.push(HashMap::new());
                let value = self.capture(&set.body);
                self.scopes.pop();
                self.assign(&set.target, value?)?;
            }
            Stmt::WithBlock(with) => {
                self.line = usize::from(with.span().start_line);
                let mut values = Vec::new();
                for (_, expr) in &with.assignments {
                    values.push(self.eval(expr)?);
                }
                self.scopes.push(HashMap::new());
                let mut result = Ok(Flow::Next);
                for ((target, _), value) in with.assignments.iter().zip(values) {
                    result = result.and_then(|f| self.assign(target, value).map(|()| f));
                }
                let result = result.and_then(|_| self.exec_block(&with.body, out));
                self.scopes.pop();
                return result;
            }
            Stmt::Macro(m) => {
                self.macros.push(m);
                self.set(m.name, Value::Macro(self.macros.len() - 1));
            }
            Stmt::Break(_) => return Ok(Flow::Break),
            Stmt::Continue(_) => return Ok(Flow::Continue),
            Stmt::Template(t) => return self.exec_block(&t.children, out),
            Stmt::CallBlock(_) => return self.error("call blocks are not supported"),
            Stmt::FilterBlock(_) => return self.error("filter blocks are not supported"),
            Stmt::AutoEscape(_) => return self.error("autoescape is not supported"),
            Stmt::Do(_) => return self.error("the do statement is not supported"),
        }
        Ok(Flow::Next)
    }

    fn exec_if(&mut self, mut cond: &'t ast::Spanned<ast::IfCond<'s>>, out: &mut String) -> Result<Flow> {
        // An elif is an if in the else branch; walking it here keeps a ladder from counting as nesting.
        loop {
            self.line = usize::from(cond.span().start_line);
            if self.eval(&cond.expr)?.is_true() {
                return self.exec_block(&cond.true_body, out);
            }
            match cond.false_body.as_slice() {
                [Stmt::IfCond(next)] => cond = next,
                body => return self.exec_block(body, out),
            }
        }
    }

    fn exec_for(&mut self, f: &'t ast::Spanned<ast::ForLoop<'s>>, out: &mut String) -> Result<Flow> {
        if f.recursive {
            return self.error("recursive loops are not supported");
        }
        let iterated = self.eval(&f.iter)?;
        let mut items = self.items(&iterated)?;
        if let Some(condition) = &f.filter_expr {
            let mut kept = Vec::new();
            for item in &items.items {
                self.scopes.push(HashMap::new());
                let keep = self.assign(&f.target, item.clone()).and_then(|()| self.eval(condition));
                self.scopes.pop();
                if keep?.is_true() {
                    self.charge(64)?;
                    kept.push(item.clone());
                }
            }
            items = Rc::new(List::new(kept, false).or_else(|e| self.error(e))?);
        }
        if items.items.is_empty() {
            return self.exec_block(&f.else_body, out);
        }
        for (index, item) in items.items.iter().enumerate() {
            self.charge(limits::TEMPLATE_STEP_FUEL)?;
            self.scopes.push(HashMap::new());
            self.set("loop", Value::Loop(Rc::new(Loop { items: items.clone(), index })));
            let flow = self.assign(&f.target, item.clone()).and_then(|()| self.exec_block(&f.body, out));
            self.scopes.pop();
            if flow? == Flow::Break {
                break;
            }
        }
        Ok(Flow::Next)
    }

    /// The items that iterating over a value gives, paying for them where they have to be made.
    pub(super) fn items(&mut self, value: &Value) -> Result<Rc<List>> {
        let items: Vec<Value> = match value {
            Value::List(l) => return Ok(l.clone()),
            Value::Undefined => Vec::new(),
            Value::Map(m) => {
                self.charge(64 * m.entries.len() as u64)?;
                m.entries.iter().map(|(k, _)| Value::Str(k.clone())).collect()
            }
            Value::Str(s) => {
                self.charge(64 * s.len() as u64)?;
                s.chars().map(|c| Value::str(c.encode_utf8(&mut [0; 4]))).collect()
            }
            other => return self.error(format!("{} cannot be iterated", other.kind())),
        };
        List::new(items, false).map(Rc::new).or_else(|e| self.error(e))
    }

    fn set(&mut self, name: &'s str, value: Value) {
        if let Some(scope) = self.scopes.last_mut() {
            scope.insert(name, value);
        }
    }

    fn assign(&mut self, target: &'t Expr<'s>, value: Value) -> Result<()> {
        match target {
            Expr::Var(v) => {
                self.charge(64)?;
                self.set(v.id, value);
                Ok(())
            }
            Expr::Tuple(t) => self.unpack(&t.items, &value),
            Expr::List(l) => self.unpack(&l.items, &value),
            Expr::GetAttr(attr) => {
                let Value::Namespace(ns) = self.eval(&attr.expr)? else {
                    return self.error("only attributes of a namespace can be set");
                };
                if matches!(value, Value::Namespace(_) | Value::Loop(_)) {
                    return self.error(format!("{} cannot be put into a namespace", value.kind()));
                }
                let cost = 64 * (1 + ns.borrow().len() as u64);
                self.charge(cost)?;
                let mut entries = ns.borrow_mut();
                match entries.iter_mut().find(|(k, _)| &**k == attr.name) {
                    Some(slot) => slot.1 = value,
                    None => entries.push((attr.name.into(), value)),
                }
                Ok(())
            }
            _ => self.error("cannot assign to this expression"),
        }
    }

    fn unpack(&mut self, targets: &'t [Expr<'s>], value: &Value) -> Result<()> {
        let items = self.items(value)?;
        if items.items.len() != targets.len() {
            return self.error(format!("cannot unpack {} values into {}", items.items.len(), targets.len()));
        }
        for (target, item) in targets.iter().zip(&items.items) {
            self.nested(|this| this.assign(target, item.clone()))?;
        }
        Ok(())
    }

    fn lookup(&self, name: &str) -> Option<Value> {
        let local = self.scopes.iter().rev().find_map(|s| s.get(name));
        local.or_else(|| self.globals.get(name)).cloned()
    }

    fn eval(&mut self, expr: &'t Expr<'s>) -> Result<Value> {
        self.nested(|this| this.eval_here(expr))
    }

    fn eval_here(&mut self, expr: &'t Expr<'s>) -> Result<Value> {
        match expr {
            Expr::Var(v) => {
                self.charge(16 * self.scopes.len() as u64)?;
                Ok(self.lookup(v.id).unwrap_or(Value::Undefined))
            }
            Expr::Const(c) => self.constant(&c.value),
            Expr::GetAttr(a) => {
                let object = self.eval(&a.expr)?;
                self.attribute(&object, a.name)
            }
            Expr::GetItem(i) => {
                let object = self.eval(&i.expr)?;
                let key = self.eval(&i.subscript_expr)?;
                self.subscript(&object, &key)
            }
            Expr::Slice(s) => self.slice(s),
            Expr::UnaryOp(u) => {
                let value = self.eval(&u.expr)?;
                match u.op {
                    UnaryOpKind::Not => Ok(Value::Bool(!value.is_true())),
                    UnaryOpKind::Neg => self.negate(&value),
                }
            }
            Expr::BinOp(b) => self.binary(b),
            Expr::Compare(c) => self.compare_chain(c),
            Expr::IfExpr(i) => {
                if self.eval(&i.test_expr)?.is_true() {
                    self.eval(&i.true_expr)
                } else {
                    i.false_expr.as_ref().map_or(Ok(Value::Undefined), |e| self.eval(e))
                }
            }
            Expr::Filter(f) => {
                let Some(input) = &f.expr else { return self.error("a filter needs a value") };
                let input = self.eval(input)?;
                let args = self.args(&f.args)?;
                self.filter(f.name, input, args)
            }
            Expr::Test(t) => {
                let input = self.eval(&t.expr)?;
                let args = self.args(&t.args)?;
                Ok(Value::Bool(self.test(t.name, &input, args)?))
            }
            Expr::Call(c) => self.call(c),
            Expr::List(l) => self.sequence(&l.items, false),
            Expr::Tuple(t) => self.sequence(&t.items, true),
            Expr::Map(m) => self.mapping(m),
        }
    }

    fn sequence(&mut self, exprs: &'t [Expr<'s>], tuple: bool) -> Result<Value> {
        let mut items = Vec::new();
        for e in exprs {
            items.push(self.eval(e)?);
        }
        self.list(items, tuple)
    }

    fn mapping(&mut self, m: &'t ast::Map<'s>) -> Result<Value> {
        let mut entries = Vec::new();
        for (key, value) in m.keys.iter().zip(&m.values) {
            let Value::Str(key) = self.eval(key)? else {
                return self.error("only strings can be keys of a mapping");
            };
            entries.push((key, self.eval(value)?));
        }
        self.charge(128 * entries.len() as u64 + 64)?;
        Value::map(entries).or_else(|e| self.error(e))
    }

    fn constant(&mut self, value: &minijinja::Value) -> Result<Value> {
        use minijinja::value::ValueKind;
        match value.kind() {
            ValueKind::None => Ok(Value::None),
            ValueKind::Bool => Ok(Value::Bool(value.is_true())),
            ValueKind::String => self.text(value.as_str().unwrap_or_default()),
            ValueKind::Number if value.is_integer() => match value.as_i64() {
                Some(i) => Ok(Value::Int(i)),
                None => self.error("integer exceeds 64 bits"),
            },
            ValueKind::Number => match f64::try_from(value.clone()) {
                Ok(f) => Ok(Value::Float(f)),
                Err(_) => self.error("number is not representable"),
            },
            other => self.error(format!("{other} constant is not supported")),
        }
    }

    /// `object.name`.
    pub(super) fn attribute(&mut self, object: &Value, name: &str) -> Result<Value> {
        match object {
            Value::Undefined => self.error(format!("undefined value has no attribute {name:?}")),
            Value::Map(m) => {
                self.charge(8 * m.entries.len() as u64)?;
                Ok(m.get(name).cloned().unwrap_or(Value::Undefined))
            }
            Value::Namespace(ns) => {
                let entries = ns.borrow();
                self.charge(8 * entries.len() as u64)?;
                let found = entries.iter().find(|(k, _)| &**k == name);
                Ok(found.map_or(Value::Undefined, |(_, v)| v.clone()))
            }
            Value::Loop(l) => Ok(loop_attribute(l, name)),
            _ => Ok(Value::Undefined),
        }
    }

    /// `object[key]`.
    fn subscript(&mut self, object: &Value, key: &Value) -> Result<Value> {
        match (object, key) {
            (Value::Undefined, _) => self.error("undefined value cannot be indexed"),
            (Value::Map(_) | Value::Namespace(_) | Value::Loop(_), Value::Str(name)) => {
                self.attribute(object, name)
            }
            (Value::List(l), _) => {
                let found = key.as_int().and_then(|i| index(l.items.len(), i));
                Ok(found.and_then(|i| l.items.get(i)).cloned().unwrap_or(Value::Undefined))
            }
            (Value::Str(s), _) => {
                self.charge(s.len() as u64)?;
                let found = key.as_int().and_then(|i| index(s.chars().count(), i));
                Ok(found
                    .and_then(|i| s.chars().nth(i))
                    .map_or(Value::Undefined, |c| Value::str(c.encode_utf8(&mut [0; 4]))))
            }
            _ => Ok(Value::Undefined),
        }
    }

    fn slice(&mut self, s: &'t ast::Slice<'s>) -> Result<Value> {
        let object = self.eval(&s.expr)?;
        let mut bounds = [None; 3];
        for (slot, expr) in bounds.iter_mut().zip([&s.start, &s.stop, &s.step]) {
            let Some(expr) = expr else { continue };
            *slot = match self.eval(expr)? {
                Value::None => None,
                other => match other.as_int() {
                    Some(i) => Some(i),
                    None => return self.error(format!("slice bound is {}", other.kind())),
                },
            };
        }
        let [start, stop, step] = bounds;
        let step = step.unwrap_or(1);
        if step == 0 {
            return self.error("slice step is zero");
        }
        match &object {
            Value::List(l) => {
                let picked = slice_indices(l.items.len(), start, stop, step);
                self.charge(64 * picked.len() as u64)?;
                let items = picked.iter().filter_map(|&i| l.items.get(i)).cloned().collect();
                self.list(items, l.tuple)
            }
            Value::Str(text) => {
                self.charge(16 * text.len() as u64)?;
                let chars: Vec<char> = text.chars().collect();
                let picked = slice_indices(chars.len(), start, stop, step);
                let text: String = picked.iter().filter_map(|&i| chars.get(i)).collect();
                Ok(Value::Str(text.into()))
            }
            Value::Undefined => self.list(Vec::new(), false),
            other => self.error(format!("{} cannot be sliced", other.kind())),
        }
    }

    fn negate(&mut self, value: &Value) -> Result<Value> {
        match (value, value.as_int()) {
            (Value::Float(f), _) => Ok(Value::Float(-f)),
            (_, Some(i)) => match i.checked_neg() {
                Some(i) => Ok(Value::Int(i)),
                None => self.error("integer exceeds 64 bits"),
            },
            _ => self.error(format!("{} cannot be negated", value.kind())),
        }
    }

    fn binary(&mut self, b: &'t ast::BinOp<'s>) -> Result<Value> {
        let left = self.eval(&b.left)?;
        match b.op {
            BinOpKind::ScAnd if !left.is_true() => return Ok(left),
            BinOpKind::ScOr if left.is_true() => return Ok(left),
            BinOpKind::ScAnd | BinOpKind::ScOr => return self.eval(&b.right),
            _ => {}
        }
        let right = self.eval(&b.right)?;
        let comparison = match b.op {
            BinOpKind::Eq => Some(CompareOpKind::Eq),
            BinOpKind::Ne => Some(CompareOpKind::Ne),
            BinOpKind::Lt => Some(CompareOpKind::Lt),
            BinOpKind::Lte => Some(CompareOpKind::Lte),
            BinOpKind::Gt => Some(CompareOpKind::Gt),
            BinOpKind::Gte => Some(CompareOpKind::Gte),
            BinOpKind::In => Some(CompareOpKind::In),
            _ => None,
        };
        if let Some(op) = comparison {
            return Ok(Value::Bool(self.compare(op, &left, &right)?));
        }
        match (b.op, &left, &right) {
            (BinOpKind::Concat, _, _) => {
                let (a, b) = (self.text_of(&left)?, self.text_of(&right)?);
                self.concat(&a, &b)
            }
            (BinOpKind::Add, Value::Str(a), Value::Str(b)) => self.concat(a, b),
            (BinOpKind::Add, Value::List(a), Value::List(b)) if a.tuple == b.tuple => {
                self.charge(64 * (a.items.len() + b.items.len()) as u64)?;
                self.list(a.items.iter().chain(&b.items).cloned().collect(), a.tuple)
            }
            (BinOpKind::Mul, Value::Str(_) | Value::List(_), _) => self.repeat(&left, &right),
            (BinOpKind::Mul, _, Value::Str(_) | Value::List(_)) => self.repeat(&right, &left),
            _ => self.arithmetic(b.op, &left, &right),
        }
    }

    fn concat(&mut self, a: &str, b: &str) -> Result<Value> {
        // Twice, because the text is put together before it is shared.
        self.charge(2 * (a.len() + b.len()) as u64)?;
        Ok(Value::Str([a, b].concat().into()))
    }

    fn repeat(&mut self, value: &Value, times: &Value) -> Result<Value> {
        let Some(times) = times.as_int() else {
            return self.error(format!("{} cannot be multiplied by {}", value.kind(), times.kind()));
        };
        let times = u64::try_from(times).unwrap_or(0);
        let count = |n: usize, unit: u64| (n as u64).saturating_mul(unit).saturating_mul(times);
        match value {
            Value::Str(s) => {
                self.charge(count(s.len(), 2))?;
                let n = if s.is_empty() { 0 } else { times as usize };
                Ok(Value::Str(s.repeat(n).into()))
            }
            Value::List(l) => {
                self.charge(count(l.items.len(), 64))?;
                let n = if l.items.is_empty() { 0 } else { times as usize };
                let items = std::iter::repeat_n(&l.items, n).flatten().cloned().collect();
                self.list(items, l.tuple)
            }
            other => self.error(format!("{} cannot be repeated", other.kind())),
        }
    }

    fn arithmetic(&mut self, op: BinOpKind, left: &Value, right: &Value) -> Result<Value> {
        let (Some(a), Some(b)) = (left.as_float(), right.as_float()) else {
            return self.error(format!("no arithmetic between {} and {}", left.kind(), right.kind()));
        };
        let zero = b == 0.0;
        if zero && matches!(op, BinOpKind::Div | BinOpKind::FloorDiv | BinOpKind::Rem) {
            return self.error("division by zero");
        }
        if let (Some(a), Some(b)) = (left.as_int(), right.as_int()) {
            let exact = match op {
                BinOpKind::Add => a.checked_add(b),
                BinOpKind::Sub => a.checked_sub(b),
                BinOpKind::Mul => a.checked_mul(b),
                BinOpKind::FloorDiv => floor_div(a, b),
                BinOpKind::Rem => floor_div(a, b).and_then(|q| a.checked_sub(q.checked_mul(b)?)),
                BinOpKind::Pow if b >= 0 => u32::try_from(b).ok().and_then(|b| a.checked_pow(b)),
                _ => return Ok(Value::Float(float_arithmetic(op, a as f64, b as f64))),
            };
            return match exact {
                Some(i) => Ok(Value::Int(i)),
                None => self.error("integer exceeds 64 bits"),
            };
        }
        Ok(Value::Float(float_arithmetic(op, a, b)))
    }

    fn compare_chain(&mut self, c: &'t ast::Compare<'s>) -> Result<Value> {
        let mut left = self.eval(&c.expr)?;
        for part in &c.ops {
            let right = self.eval(&part.expr)?;
            if !self.compare(part.op, &left, &right)? {
                return Ok(Value::Bool(false));
            }
            left = right;
        }
        Ok(Value::Bool(true))
    }

    pub(super) fn compare(&mut self, op: CompareOpKind, left: &Value, right: &Value) -> Result<bool> {
        use std::cmp::Ordering;
        match op {
            CompareOpKind::Eq => return self.equal(left, right),
            CompareOpKind::Ne => return Ok(!self.equal(left, right)?),
            CompareOpKind::In => return self.contains(right, left),
            CompareOpKind::NotIn => return Ok(!self.contains(right, left)?),
            _ => {}
        }
        let ordering = self.order(left, right)?;
        Ok(match op {
            CompareOpKind::Lt => ordering == Some(Ordering::Less),
            CompareOpKind::Lte => matches!(ordering, Some(Ordering::Less | Ordering::Equal)),
            CompareOpKind::Gt => ordering == Some(Ordering::Greater),
            _ => matches!(ordering, Some(Ordering::Greater | Ordering::Equal)),
        })
    }

    /// Order of two strings or two numbers; `None` when one is not a number.
    pub(super) fn order(&mut self, left: &Value, right: &Value) -> Result<Option<std::cmp::Ordering>> {
        match (left, right) {
            (Value::Str(a), Value::Str(b)) => {
                self.charge(a.len().min(b.len()) as u64)?;
                Ok(Some(a.cmp(b)))
            }
            _ => match (left.as_int(), right.as_int(), left.as_float(), right.as_float()) {
                (Some(a), Some(b), _, _) => Ok(Some(a.cmp(&b))),
                (_, _, Some(a), Some(b)) => Ok(a.partial_cmp(&b)),
                _ => self.error(format!("{} and {} have no order", left.kind(), right.kind())),
            },
        }
    }

    /// Equality, paying for the walk. Looking up the keys of a map may take the square of its size.
    fn equal(&mut self, left: &Value, right: &Value) -> Result<bool> {
        let weight = left.weight().min(right.weight());
        let keys = |v: &Value| matches!(v, Value::Map(_) | Value::List(_));
        let cost = if keys(left) && keys(right) { weight.saturating_mul(weight / 64 + 1) } else { weight };
        self.charge(cost)?;
        Ok(left.equals(right))
    }

    pub(super) fn contains(&mut self, container: &Value, item: &Value) -> Result<bool> {
        match (container, item) {
            (Value::Str(s), Value::Str(part)) => {
                self.charge((s.len() + part.len()) as u64)?;
                Ok(s.contains(&**part))
            }
            (Value::Str(_), other) => self.error(format!("{} cannot be in a string", other.kind())),
            (Value::Map(m), Value::Str(key)) => {
                self.charge(8 * m.entries.len() as u64)?;
                Ok(m.get(key).is_some())
            }
            (Value::Map(_), _) | (Value::Undefined, _) => Ok(false),
            (Value::List(l), _) => {
                for x in &l.items {
                    if self.equal(x, item)? {
                        return Ok(true);
                    }
                }
                Ok(false)
            }
            (other, _) => self.error(format!("{} contains nothing", other.kind())),
        }
    }

    fn args(&mut self, args: &'t [ast::CallArg<'s>]) -> Result<Args> {
        let (mut positional, mut named) = (Vec::new(), Vec::new());
        for arg in args {
            match arg {
                ast::CallArg::Pos(e) => positional.push(self.eval(e)?),
                ast::CallArg::Kwarg(name, e) => named.push(((*name).to_owned(), self.eval(e)?)),
                _ => return self.error("argument splats are not supported"),
            }
        }
        Ok(Args { positional: positional.into_iter(), named })
    }

    /// Fails when arguments are left over.
    pub(super) fn no_more(&self, what: &str, mut args: Args) -> Result<()> {
        if args.positional.next().is_some() {
            return self.error(format!("too many arguments for {what}"));
        }
        match args.named.first() {
            Some((name, _)) => self.error(format!("{what} has no argument {name:?}")),
            None => Ok(()),
        }
    }

    fn call(&mut self, c: &'t ast::Call<'s>) -> Result<Value> {
        match &c.expr {
            Expr::GetAttr(attr) => {
                let object = self.eval(&attr.expr)?;
                let args = self.args(&c.args)?;
                self.method(&object, attr.name, args)
            }
            Expr::Var(v) => {
                let args = self.args(&c.args)?;
                match self.lookup(v.id) {
                    Some(Value::Macro(index)) => self.call_macro(index, args),
                    Some(other) => self.error(format!("{} is {}, not a function", v.id, other.kind())),
                    None => self.function(v.id, args),
                }
            }
            _ => self.error("only functions, macros and methods can be called"),
        }
    }

    fn call_macro(&mut self, index: usize, mut args: Args) -> Result<Value> {
        let Some(&m) = self.macros.get(index) else { return self.error("no such macro") };
        // A macro sees its arguments and the outermost scope.
        let hidden = self.scopes.split_off(1.min(self.scopes.len()));
        self.scopes.push(HashMap::new());
        let result = self.bind_and_run(m, &mut args);
        self.scopes.truncate(1);
        self.scopes.extend(hidden);
        let value = result?;
        self.no_more(m.name, args)?;
        Ok(value)
    }

    fn bind_and_run(&mut self, m: &'t ast::Macro<'s>, args: &mut Args) -> Result<Value> {
        let without_default = m.args.len().saturating_sub(m.defaults.len());
        for (i, param) in m.args.iter().enumerate() {
            let Expr::Var(name) = param else { return self.error("macro parameter is not a name") };
            let value = match args.take(name.id) {
                Some(v) => v,
                None => match i.checked_sub(without_default).and_then(|d| m.defaults.get(d)) {
                    Some(default) => self.eval(default)?,
                    None => Value::Undefined,
                },
            };
            self.set(name.id, value);
        }
        self.capture(&m.body)
    }

    /// `namespace(...)` and `dict(...)`.
    pub(super) fn named_entries(&mut self, args: Args) -> Result<Entries> {
        let mut entries = Vec::new();
        for value in args.positional {
            match value {
                Value::Map(m) => entries.extend(m.entries.iter().cloned()),
                other => return self.error(format!("wanted a mapping, found {}", other.kind())),
            }
        }
        entries.extend(args.named.into_iter().map(|(k, v)| (k.as_str().into(), v)));
        self.charge(128 * entries.len() as u64 + 64)?;
        Ok(entries)
    }

    pub(super) fn namespace(&mut self, args: Args) -> Result<Value> {
        let entries = self.named_entries(args)?;
        if let Some((_, v)) = entries.iter().find(|(_, v)| matches!(v, Value::Namespace(_) | Value::Loop(_)))
        {
            return self.error(format!("{} cannot be put into a namespace", v.kind()));
        }
        // Building a map first removes double keys.
        match Value::map(entries).or_else(|e| self.error(e))? {
            Value::Map(m) => Ok(Value::Namespace(Rc::new(RefCell::new(m.entries.clone())))),
            other => self.error(format!("wanted a mapping, found {}", other.kind())),
        }
    }
}

fn loop_attribute(l: &Loop, name: &str) -> Value {
    let (i, n) = (l.index, l.items.items.len());
    let item =
        |at: Option<usize>| at.and_then(|at| l.items.items.get(at)).cloned().unwrap_or(Value::Undefined);
    match name {
        "index" => Value::Int(i as i64 + 1),
        "index0" => Value::Int(i as i64),
        "revindex" => Value::Int((n - i) as i64),
        "revindex0" => Value::Int((n - i) as i64 - 1),
        "first" => Value::Bool(i == 0),
        "last" => Value::Bool(i + 1 == n),
        "length" => Value::Int(n as i64),
        "previtem" => item(i.checked_sub(1)),
        "nextitem" => item(i.checked_add(1)),
        _ => Value::Undefined,
    }
}

/// Position of index `i`, counted from the end when negative.
fn index(len: usize, i: i64) -> Option<usize> {
    let len = i64::try_from(len).ok()?;
    let at = if i < 0 { i.checked_add(len)? } else { i };
    usize::try_from(at).ok().filter(|_| at < len)
}

/// The positions that a slice with these bounds picks.
fn slice_indices(len: usize, start: Option<i64>, stop: Option<i64>, step: i64) -> Vec<usize> {
    let len = i64::try_from(len).unwrap_or(i64::MAX);
    let clamp =
        |i: i64, low: i64, high: i64| (if i < 0 { i.saturating_add(len) } else { i }).clamp(low, high);
    let mut picked = Vec::new();
    if step > 0 {
        let mut at = start.map_or(0, |i| clamp(i, 0, len));
        let stop = stop.map_or(len, |i| clamp(i, 0, len));
        while at < stop {
            picked.push(at as usize);
            at = at.saturating_add(step);
        }
    } else {
        let mut at = start.map_or(len - 1, |i| clamp(i, -1, len - 1));
        let stop = stop.map_or(-1, |i| clamp(i, -1, len - 1));
        while at > stop {
            picked.push(at as usize);
            at = at.saturating_add(step);
        }
    }
    picked
}

/// Division rounded towards minus infinity, as in Python.
fn floor_div(a: i64, b: i64) -> Option<i64> {
    let q = a.checked_div(b)?;
    let exact = a.checked_rem(b)? == 0;
    if !exact && (a < 0) != (b < 0) { q.checked_sub(1) } else { Some(q) }
}

fn float_arithmetic(op: BinOpKind, a: f64, b: f64) -> f64 {
    match op {
        BinOpKind::Add => a + b,
        BinOpKind::Sub => a - b,
        BinOpKind::Mul => a * b,
        BinOpKind::Div => a / b,
        BinOpKind::FloorDiv => (a / b).floor(),
        BinOpKind::Rem => a - b * (a / b).floor(),
        _ => a.powf(b),
    }
}
