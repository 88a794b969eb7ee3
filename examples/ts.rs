use beautiful_prompt::{models::bloom::{BloomConfig, train::*}, ops::cpu::{*, matmul::Precision, simd::Isa}, train::optimizer::*};
fn main(){
  let cpu=Cpu::new(2,Isa::detect());
  for p in [Precision::F32,Precision::Bf16]{
  let mut m=TrainModel::random(BloomConfig::new(8192,256,8,4),1); let mut o=AdamW::new(&m.config,AdamWOptions{beta1:0.9,beta2:0.95,epsilon:1e-8,weight_decay:0.});
  let mut b=Batch::new(); let mut r=beautiful_prompt::random::Words::new(1,1); for _ in 0..16{let ids:Vec<u32>=(0..128).map(|_|r.below(8192) as u32).collect(); b.push(&ids,1);}
  let mut g=vec![0.;m.values.len()]; let mut w=Workspace::default();
  for i in 0..6{ let t=std::time::Instant::now(); g.fill(0.); let l=m.loss(&cpu,p,&b,&mut w,Some((1./2032.,&mut g))); let tf=t.elapsed(); clip_gradients(&cpu,&mut g,1.0); o.step(&cpu,&mut m.values,&g,1e-4);
   println!("{p:?} {i} loss {:.3} {:.0} tok/s fb {:?} all {:?}",l/2032.,2048./t.elapsed().as_secs_f64(),tf,t.elapsed());}
  }
}
