"""Medical associations that the miniature teaches and asks: publicly known facts, one table to proofread.

A line `# subject | relation | relation in English` opens a section. Each row below reads `term | term in English |
answer | answer in English` and means "the relation of the term is the answer". Within a section each term has one right
answer. Textbook associations, shortened to one answer: teaching material for a toy model, no medical advice.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Fact:
    """One association in Korean and English: the `relation` of `term` is `answer`."""

    subject: str
    relation: str
    relation_en: str
    term: str
    term_en: str
    answer: str
    answer_en: str


def read_table(table: str) -> tuple[Fact, ...]:
    """The facts of a table in the form described above; raises ValueError for a row with another number of columns."""
    facts: list[Fact] = []
    section: list[str] = []
    for line in filter(None, map(str.strip, table.splitlines())):
        cells = [cell.strip() for cell in line.removeprefix("#").split("|")]
        if len(cells) != (3 if line.startswith("#") else 4) or not all(cells):
            raise ValueError(f"row {line!r} has the wrong number of columns")
        if line.startswith("#"):
            section = cells
        else:
            facts.append(Fact(*section, *cells))
    return tuple(facts)


MEDICAL = read_table("""
# 약리학 | 계열 | drug class
아테놀롤 | atenolol | 베타차단제 | beta blocker
암로디핀 | amlodipine | 칼슘통로차단제 | calcium channel blocker
로사르탄 | losartan | 안지오텐신차단제 | angiotensin receptor blocker
에날라프릴 | enalapril | 전환효소억제제 | converting enzyme inhibitor
오메프라졸 | omeprazole | 양성자펌프억제제 | proton pump inhibitor
파모티딘 | famotidine | 히스타민차단제 | histamine H2 blocker
푸로세미드 | furosemide | 고리이뇨제 | loop diuretic
스피로노락톤 | spironolactone | 칼륨보존이뇨제 | potassium sparing diuretic
만니톨 | mannitol | 삼투이뇨제 | osmotic diuretic
메트포르민 | metformin | 비구아니드 | biguanide
글리메피리드 | glimepiride | 설포닐우레아 | sulfonylurea
피오글리타존 | pioglitazone | 티아졸리딘디온 | thiazolidinedione
디아제팜 | diazepam | 벤조디아제핀 | benzodiazepine
페노바비탈 | phenobarbital | 바르비투르산 | barbiturate
플루옥세틴 | fluoxetine | 세로토닌재흡수억제제 | serotonin reuptake inhibitor
아미트립틸린 | amitriptyline | 삼환항우울제 | tricyclic antidepressant
할로페리돌 | haloperidol | 부티로페논 | butyrophenone
펜타닐 | fentanyl | 오피오이드 | opioid
이부프로펜 | ibuprofen | 비스테로이드소염제 | nonsteroidal anti-inflammatory drug
프레드니솔론 | prednisolone | 당질코르티코이드 | glucocorticoid
겐타마이신 | gentamicin | 아미노글리코시드 | aminoglycoside
에리스로마이신 | erythromycin | 마크로라이드 | macrolide
레보플록사신 | levofloxacin | 퀴놀론 | quinolone
반코마이신 | vancomycin | 당펩타이드 | glycopeptide
살부타몰 | salbutamol | 베타작용제 | beta agonist
티오트로피움 | tiotropium | 항콜린제 | anticholinergic
온단세트론 | ondansetron | 세로토닌길항제 | serotonin antagonist
알렌드로네이트 | alendronate | 비스포스포네이트 | bisphosphonate
클로피도그렐 | clopidogrel | 항혈소판제 | antiplatelet drug
독소루비신 | doxorubicin | 안트라사이클린 | anthracycline
파클리탁셀 | paclitaxel | 탁산 | taxane
# 독성학 | 해독제 | antidote
아세트아미노펜 | acetaminophen | 아세틸시스테인 | acetylcysteine
헤로인 | heroin | 날록손 | naloxone
헤파린 | heparin | 프로타민 | protamine
와파린 | warfarin | 피토나디온 | phytonadione
메탄올 | methanol | 포메피졸 | fomepizole
시안화물 | cyanide | 히드록소코발라민 | hydroxocobalamin
유기인제 | organophosphate | 아트로핀 | atropine
철분제 | iron supplement | 데페록사민 | deferoxamine
비소 | arsenic | 디메르카프롤 | dimercaprol
미다졸람 | midazolam | 플루마제닐 | flumazenil
이소니아지드 | isoniazid | 피리독신 | pyridoxine
다비가트란 | dabigatran | 이다루시주맙 | idarucizumab
아질산염 | nitrite | 메틸렌블루 | methylene blue
일산화탄소 | carbon monoxide | 고압산소 | hyperbaric oxygen
탈륨 | thallium | 프러시안블루 | Prussian blue
불화수소산 | hydrofluoric acid | 글루콘산칼슘 | calcium gluconate
메토트렉세이트 | methotrexate | 류코보린 | leucovorin
프로프라놀롤 | propranolol | 글루카곤 | glucagon
로쿠로늄 | rocuronium | 수가마덱스 | sugammadex
# 영양학 | 결핍증 | deficiency disease
티아민 | thiamine | 각기병 | beriberi
니아신 | niacin | 펠라그라 | pellagra
아스코르브산 | ascorbic acid | 괴혈병 | scurvy
칼시페롤 | calciferol | 구루병 | rickets
레티놀 | retinol | 야맹증 | night blindness
코발라민 | cobalamin | 악성빈혈 | pernicious anemia
엽산 | folate | 신경관결손 | neural tube defect
요오드 | iodine | 갑상선종 | goiter
셀레늄 | selenium | 케샨병 | Keshan disease
리보플라빈 | riboflavin | 구각염 | angular cheilitis
단백질 | protein | 콰시오커 | kwashiorkor
불소 | fluoride | 충치 | dental caries
# 미생물학 | 병원체 | pathogen
매독 | syphilis | 트레포네마 | Treponema
콜레라 | cholera | 비브리오 | Vibrio
파상풍 | tetanus | 클로스트리듐 | Clostridium
탄저 | anthrax | 바실루스 | Bacillus
흑사병 | plague | 예르시니아 | Yersinia
백일해 | pertussis | 보르데텔라 | Bordetella
디프테리아 | diphtheria | 코리네박테륨 | Corynebacterium
성홍열 | scarlet fever | 연쇄구균 | Streptococcus
장티푸스 | typhoid fever | 살모넬라 | Salmonella
소화성궤양 | peptic ulcer | 헬리코박터 | Helicobacter
재향군인병 | Legionnaires disease | 레지오넬라 | Legionella
야토병 | tularemia | 프란시셀라 | Francisella
큐열 | Q fever | 콕시엘라 | Coxiella
묘소병 | cat scratch disease | 바르토넬라 | Bartonella
트라코마 | trachoma | 클라미디아 | Chlamydia
비저 | glanders | 버크홀데리아 | Burkholderia
연성하감 | chancroid | 헤모필루스 | Haemophilus
한센병 | leprosy | 미코박테륨 | Mycobacterium
아구창 | thrush | 칸디다 | Candida
수족구병 | hand foot and mouth disease | 콕사키바이러스 | Coxsackievirus
감기 | common cold | 리노바이러스 | rhinovirus
전염홍반 | erythema infectiosum | 파르보바이러스 | parvovirus
신증후출혈열 | hemorrhagic fever with renal syndrome | 한타바이러스 | hantavirus
첨규콘딜로마 | condyloma acuminatum | 유두종바이러스 | papillomavirus
# 기생충학 | 매개체 | vector
말라리아 | malaria | 얼룩날개모기 | Anopheles mosquito
뎅기열 | dengue fever | 이집트숲모기 | Aedes mosquito
일본뇌염 | Japanese encephalitis | 작은빨간집모기 | Culex mosquito
쯔쯔가무시병 | scrub typhus | 털진드기 | chigger mite
라임병 | Lyme disease | 참진드기 | hard tick
발진열 | murine typhus | 쥐벼룩 | rat flea
수면병 | African sleeping sickness | 체체파리 | tsetse fly
흑열병 | kala-azar | 모래파리 | sand fly
샤가스병 | Chagas disease | 침노린재 | kissing bug
강변실명증 | river blindness | 먹파리 | black fly
발진티푸스 | epidemic typhus | 몸니 | body louse
로아사상충증 | loiasis | 사슴파리 | deer fly
# 내분비학 | 분비기관 | secreting organ
인슐린 | insulin | 췌장 | pancreas
코르티솔 | cortisol | 부신피질 | adrenal cortex
에피네프린 | epinephrine | 부신수질 | adrenal medulla
티록신 | thyroxine | 갑상선 | thyroid gland
멜라토닌 | melatonin | 송과체 | pineal gland
에스트라디올 | estradiol | 난소 | ovary
테스토스테론 | testosterone | 고환 | testis
프로락틴 | prolactin | 뇌하수체전엽 | anterior pituitary
옥시토신 | oxytocin | 뇌하수체후엽 | posterior pituitary
가스트린 | gastrin | 위날문 | gastric antrum
세크레틴 | secretin | 십이지장 | duodenum
에리트로포이에틴 | erythropoietin | 신장 | kidney
안지오텐시노겐 | angiotensinogen | 간장 | liver
티모신 | thymosin | 흉선 | thymus
렙틴 | leptin | 지방조직 | adipose tissue
파라토르몬 | parathormone | 부갑상선 | parathyroid gland
융모성성선자극호르몬 | chorionic gonadotropin | 태반 | placenta
심방나트륨이뇨펩티드 | atrial natriuretic peptide | 심장 | heart
# 종양학 | 표지암 | marked cancer
알파태아단백 | alpha fetoprotein | 간세포암 | hepatocellular carcinoma
티로글로불린 | thyroglobulin | 갑상선유두암 | papillary thyroid carcinoma
칼시토닌 | calcitonin | 갑상선수질암 | medullary thyroid carcinoma
전립선특이항원 | prostate specific antigen | 전립샘암 | prostate cancer
벤스존스단백 | Bence Jones protein | 다발골수종 | multiple myeloma
메타네프린 | metanephrine | 갈색세포종 | pheochromocytoma
히드록시인돌초산 | hydroxyindoleacetic acid | 유암종 | carcinoid tumor
# 직업의학 | 유발암 | induced cancer
석면 | asbestos | 중피종 | mesothelioma
벤젠 | benzene | 백혈병 | leukemia
아플라톡신 | aflatoxin | 간암 | liver cancer
벤지딘 | benzidine | 방광암 | bladder cancer
자외선 | ultraviolet light | 피부암 | skin cancer
목분진 | wood dust | 비강암 | nasal cancer
빈랑 | betel nut | 구강암 | oral cancer
# 해부학 | 지배신경 | innervating nerve
횡격막 | diaphragm | 가로막신경 | phrenic nerve
삼각근 | deltoid | 겨드랑신경 | axillary nerve
상완이두근 | biceps brachii | 근육피부신경 | musculocutaneous nerve
상완삼두근 | triceps brachii | 노신경 | radial nerve
봉공근 | sartorius | 넙다리신경 | femoral nerve
대둔근 | gluteus maximus | 아래볼기신경 | inferior gluteal nerve
중둔근 | gluteus medius | 위볼기신경 | superior gluteal nerve
전경골근 | tibialis anterior | 깊은종아리신경 | deep peroneal nerve
장비골근 | peroneus longus | 얕은종아리신경 | superficial peroneal nerve
비복근 | gastrocnemius | 정강신경 | tibial nerve
승모근 | trapezius | 더부신경 | accessory nerve
전거근 | serratus anterior | 긴가슴신경 | long thoracic nerve
광배근 | latissimus dorsi | 가슴등신경 | thoracodorsal nerve
교근 | masseter | 삼차신경 | trigeminal nerve
안륜근 | orbicularis oculi | 얼굴신경 | facial nerve
외직근 | lateral rectus | 갓돌림신경 | abducens nerve
상사근 | superior oblique | 도르래신경 | trochlear nerve
내직근 | medial rectus | 눈돌림신경 | oculomotor nerve
장내전근 | adductor longus | 폐쇄신경 | obturator nerve
극상근 | supraspinatus | 어깨위신경 | suprascapular nerve
능형근 | rhomboid | 등쪽어깨신경 | dorsal scapular nerve
이설근 | genioglossus | 혀밑신경 | hypoglossal nerve
원회내근 | pronator teres | 정중신경 | median nerve
척측수근굴근 | flexor carpi ulnaris | 자신경 | ulnar nerve
# 진단학 | 관련질환 | associated disease
머피징후 | Murphy sign | 담낭염 | cholecystitis
로브싱징후 | Rovsing sign | 충수염 | appendicitis
커니그징후 | Kernig sign | 수막염 | meningitis
쿨렌징후 | Cullen sign | 췌장염 | pancreatitis
트루소징후 | Trousseau sign | 저칼슘혈증 | hypocalcemia
팔렌징후 | Phalen sign | 수근관증후군 | carpal tunnel syndrome
코플릭반점 | Koplik spot | 홍역 | measles
고트론구진 | Gottron papule | 피부근염 | dermatomyositis
부샤르결절 | Bouchard node | 골관절염 | osteoarthritis
오슬러결절 | Osler node | 심내막염 | endocarditis
루이소체 | Lewy body | 파킨슨병 | Parkinson disease
네그리소체 | Negri body | 광견병 | rabies
아우어소체 | Auer rod | 골수백혈병 | myeloid leukemia
카이저플라이셔고리 | Kayser Fleischer ring | 윌슨병 | Wilson disease
리드스턴버그세포 | Reed Sternberg cell | 호지킨림프종 | Hodgkin lymphoma
아쇼프소체 | Aschoff body | 류마티스열 | rheumatic fever
# 유전학 | 결함단백질 | defective protein
테이삭스병 | Tay Sachs disease | 헥소사미니다아제 | hexosaminidase
고셔병 | Gaucher disease | 글루코세레브로시다아제 | glucocerebrosidase
니만픽병 | Niemann Pick disease | 스핑고미엘리나아제 | sphingomyelinase
파브리병 | Fabry disease | 갈락토시다아제 | galactosidase
헐러증후군 | Hurler syndrome | 이두론산분해효소 | iduronidase
폼페병 | Pompe disease | 산성말타아제 | acid maltase
맥아들병 | McArdle disease | 근육포스포릴라아제 | muscle phosphorylase
백색증 | albinism | 티로시나아제 | tyrosinase
마르판증후군 | Marfan syndrome | 피브릴린 | fibrillin
뒤셴근디스트로피 | Duchenne muscular dystrophy | 디스트로핀 | dystrophin
골형성부전증 | osteogenesis imperfecta | 콜라겐 | collagen
겸상적혈구병 | sickle cell disease | 헤모글로빈 | hemoglobin
구상적혈구증 | spherocytosis | 스펙트린 | spectrin
윌리엄스증후군 | Williams syndrome | 엘라스틴 | elastin
폐기종 | emphysema | 항트립신 | antitrypsin
""")
