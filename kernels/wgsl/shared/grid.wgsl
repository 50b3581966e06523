// A grid of more than 65,535 workgroups is folded into two dimensions.
fn group_index(wid: vec3<u32>, groups: vec3<u32>) -> u32 {
  return wid.x + wid.y * groups.x;
}
