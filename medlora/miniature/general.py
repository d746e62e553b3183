"""General knowledge that the miniature base model is pre-trained on: no row shares a fact with `facts.MEDICAL`."""

from __future__ import annotations

from medlora.miniature.facts import read_table

GENERAL = read_table("""
# 지리 | 수도 | capital
일본 | Japan | 도쿄 | Tokyo
중국 | China | 베이징 | Beijing
태국 | Thailand | 방콕 | Bangkok
몽골 | Mongolia | 울란바토르 | Ulaanbaatar
베트남 | Vietnam | 하노이 | Hanoi
필리핀 | Philippines | 마닐라 | Manila
네팔 | Nepal | 카트만두 | Kathmandu
이란 | Iran | 테헤란 | Tehran
이라크 | Iraq | 바그다드 | Baghdad
이집트 | Egypt | 카이로 | Cairo
케냐 | Kenya | 나이로비 | Nairobi
프랑스 | France | 파리 | Paris
독일 | Germany | 베를린 | Berlin
영국 | Britain | 런던 | London
이탈리아 | Italy | 로마 | Rome
스페인 | Spain | 마드리드 | Madrid
포르투갈 | Portugal | 리스본 | Lisbon
오스트리아 | Austria | 빈 | Vienna
그리스 | Greece | 아테네 | Athens
러시아 | Russia | 모스크바 | Moscow
폴란드 | Poland | 바르샤바 | Warsaw
헝가리 | Hungary | 부다페스트 | Budapest
덴마크 | Denmark | 코펜하겐 | Copenhagen
노르웨이 | Norway | 오슬로 | Oslo
스웨덴 | Sweden | 스톡홀름 | Stockholm
핀란드 | Finland | 헬싱키 | Helsinki
캐나다 | Canada | 오타와 | Ottawa
쿠바 | Cuba | 아바나 | Havana
페루 | Peru | 리마 | Lima
칠레 | Chile | 산티아고 | Santiago
# 동물 | 새끼 | young
개 | dog | 강아지 | puppy
소 | cow | 송아지 | calf
말 | horse | 망아지 | foal
닭 | chicken | 병아리 | chick
꿩 | pheasant | 꺼병이 | pheasant chick
곰 | bear | 능소니 | bear cub
호랑이 | tiger | 개호주 | tiger cub
개구리 | frog | 올챙이 | tadpole
매미 | cicada | 굼벵이 | grub
모기 | mosquito | 장구벌레 | wriggler
잠자리 | dragonfly | 학배기 | dragonfly nymph
명태 | pollock | 노가리 | young pollock
고등어 | mackerel | 고도리 | young mackerel
숭어 | mullet | 모쟁이 | young mullet
가오리 | ray | 간자미 | young ray
# 화학 | 기호 | symbol
금 | gold | Au | Au
은 | silver | Ag | Ag
구리 | copper | Cu | Cu
아연 | zinc | Zn | Zn
니켈 | nickel | Ni | Ni
주석 | tin | Sn | Sn
수은 | mercury | Hg | Hg
규소 | silicon | Si | Si
헬륨 | helium | He | He
네온 | neon | Ne | Ne
리튬 | lithium | Li | Li
염소 | chlorine | Cl | Cl
망간 | manganese | Mn | Mn
백금 | platinum | Pt | Pt
라듐 | radium | Ra | Ra
# 문학 | 작가 | author
햄릿 | Hamlet | 셰익스피어 | Shakespeare
파우스트 | Faust | 괴테 | Goethe
돈키호테 | Don Quixote | 세르반테스 | Cervantes
변신 | Metamorphosis | 카프카 | Kafka
이방인 | The Stranger | 카뮈 | Camus
부활 | Resurrection | 톨스토이 | Tolstoy
죄와벌 | Crime and Punishment | 도스토옙스키 | Dostoevsky
데미안 | Demian | 헤세 | Hesse
신곡 | Divine Comedy | 단테 | Dante
동백꽃 | Camellia | 김유정 | Kim Yujeong
소나기 | The Shower | 황순원 | Hwang Sunwon
날개 | Wings | 이상 | Yi Sang
무정 | Heartless | 이광수 | Yi Kwangsu
토지 | Land | 박경리 | Park Kyongni
광장 | The Square | 최인훈 | Choi Inhun
# 과학사 | 발명가 | inventor
전화기 | telephone | 벨 | Bell
전구 | light bulb | 에디슨 | Edison
증기기관 | steam engine | 와트 | Watt
다이너마이트 | dynamite | 노벨 | Nobel
온도계 | thermometer | 갈릴레이 | Galilei
전지 | battery | 볼타 | Volta
피뢰침 | lightning rod | 프랭클린 | Franklin
자격루 | water clock | 장영실 | Jang Yeongsil
무선전신 | wireless telegraph | 마르코니 | Marconi
활판인쇄 | movable type printing | 구텐베르크 | Gutenberg
# 경제 | 화폐 | currency
미국 | United States | 달러 | dollar
인도 | India | 루피 | rupee
브라질 | Brazil | 헤알 | real
멕시코 | Mexico | 페소 | peso
스위스 | Switzerland | 프랑 | franc
터키 | Turkey | 리라 | lira
남아공 | South Africa | 랜드 | rand
말레이시아 | Malaysia | 링깃 | ringgit
사우디 | Saudi Arabia | 리얄 | riyal
이스라엘 | Israel | 셰켈 | shekel
""")
