use beautiful_prompt::ops::cpu::{*, matmul::*, simd::Isa, threads::Threads};
fn main(){
  let cpu=Cpu{threads:Threads::new(2),isa:Isa::detect()};
  for (m,n,k,ta,tb) in [(7,70,33,false,false),(37,130,65,true,false),(50,64,100,false,true),(100,200,513,true,true),(2048,768,256,false,true),(2048,256,768,false,false),(768,256,2048,true,false),(2048,1024,256,false,true),(256,1024,2048,true,false),(2048,8192,256,false,true)]{
    let mut s=1u32; let mut r=||{s=s.wrapping_mul(1664525).wrapping_add(1013904223); (s>>8) as f32/8388608.0-1.0};
    let a:Vec<f32>=(0..m*k).map(|_|r()).collect(); let b:Vec<f32>=(0..n*k).map(|_|r()).collect();
    let av=if ta{View::new(&a,k,m).t()}else{View::new(&a,m,k)}; let bv=if tb{View::new(&b,n,k).t()}else{View::new(&b,k,n)};
    let mut c=vec![0.;m*n]; let mut d=vec![0.;m*n];
    matmul(&cpu,Precision::F32,&mut c,n,av,bv,false); matmul(&cpu,Precision::Bf16,&mut d,n,av,bv,false);
    let e=c.iter().zip(&d).map(|(x,y)|(x-y).abs()).fold(0.,f32::max)/ (k as f32).sqrt();
    let reps=(4e9/(2.*m as f64*n as f64*k as f64)).clamp(1.,200.) as usize;
    let mut g=[0.;2]; for (i,p) in [Precision::F32,Precision::Bf16].into_iter().enumerate(){ let mut best=1e9f64; for _ in 0..3{let t=std::time::Instant::now(); for _ in 0..reps{matmul(&cpu,p,&mut d,n,av,bv,false)} best=best.min(t.elapsed().as_secs_f64()/reps as f64);} g[i]=2.*m as f64*n as f64*k as f64/best/1e9;}
    println!("{m}x{n}x{k} {ta} {tb} err {e:.4} f32 {:.0} bf16 {:.0}",g[0],g[1]);
  }
}
